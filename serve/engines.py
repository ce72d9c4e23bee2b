"""The engines of a server, one a model, loaded when first asked for; the least recently used makes room for another."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ip2p.editing.engine import EditEngine, check_queue, measured_cost
from ip2p.models.coding import edit_sizes, pixels_per_latent
from ip2p.models.components import EditModel, load_edit_model
from serve.settings import Settings

log = logging.getLogger("ip2p.serve")
# transformers and accelerate patch torch while they load: two loads at once leave it patched for good.
_LOADING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Served:
    """A model in memory and the engine that edits with it."""

    name: str
    model: EditModel
    engine: EditEngine


@dataclass
class Done:
    """What engines have counted."""

    calls: int = 0
    row_evals: int = 0
    ended: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, engine: EditEngine) -> None:
        self.calls += engine.calls
        self.row_evals += engine.row_evals
        self.ended += engine.ended


class Engines:
    """Use from one event loop. Loading and closing run in threads beside it.

    ``announce`` is told of each model that is asked for: on a cluster, so that requests find the replica that holds it.
    """

    def __init__(self, settings: Settings, announce: Callable[[str], Awaitable[object]] | None = None):
        self.settings, self._announce = settings, announce
        self._past: dict[str, Done] = {}
        self._closing: set[Served] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks weakly
        self._served: collections.OrderedDict[str, asyncio.Future[Served]] = collections.OrderedDict()

    async def get(self, name: str) -> Served:
        """The model ``name`` of the settings. Raises CheckpointError where its folder cannot be used."""
        if self._announce is not None:
            await self._announce(name)
        if name not in self._served:
            self._served[name] = asyncio.ensure_future(asyncio.to_thread(self._load, name))
            self._make_room()
        self._served.move_to_end(name)
        loading = self._served[name]
        try:
            return await asyncio.shield(loading)
        except Exception:
            if self._served.get(name) is loading:
                del self._served[name]  # the next who asks tries again
            raise

    def check_room(self) -> None:
        """Raise QueueFullError where the server as a whole has too much to do."""
        check_queue(self.queued_s(), self.settings.queue_limit_s)

    def done(self) -> dict[str, Done]:
        """What was done by model, also by engines that are gone: such counts only rise."""
        found = {name: Done(past.calls, past.row_evals, past.ended.copy()) for name, past in self._past.items()}
        for served in [*self._closing, *self.loaded()]:
            found.setdefault(served.name, Done()).add(served.engine)
        return found

    def loaded(self) -> list[Served]:
        """Those that are ready now."""
        return [one.result() for one in self._served.values() if one.done() and not one.exception()]

    def queued_s(self) -> float:
        """Seconds of work taken in and not done: engines share the device, so their work adds up."""
        return sum(served.engine.queued_s() for served in self.loaded())

    def work(self) -> bool:
        """Whether all of them can still edit."""
        return all(served.engine.works() for served in self.loaded())

    async def close(self) -> None:
        """Finish what was taken in."""
        await asyncio.gather(*[asyncio.to_thread(served.engine.close) for served in self.loaded()])
        self._served.clear()

    def _load(self, name: str) -> Served:
        with _LOADING:
            model = load_edit_model(self.settings.models[name], self.settings.dtype, self.settings.device)
        resolution = edit_sizes(model)[1]
        side = resolution // pixels_per_latent(model.vae.config)
        cost = measured_cost(model, (model.vae.config.latent_channels, side, side))
        log.info("model %s: calls of %d rows, %.3f s each", name, cost.knee(), cost.of_call(cost.knee()))
        return Served(name, model, EditEngine(model, cost, self.settings.queue_limit_s))

    def _make_room(self) -> None:
        while len(self._served) > max(1, self.settings.models_held):
            name, old = self._served.popitem(last=False)
            log.info("model %s makes room", name)
            old.add_done_callback(self._retire)

    def _retire(self, loaded: asyncio.Future[Served]) -> None:
        if not loaded.cancelled() and loaded.exception() is None:
            self._closing.add(loaded.result())
            task = asyncio.ensure_future(self._closed(loaded.result()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _closed(self, served: Served) -> None:
        await asyncio.to_thread(served.engine.close)
        self._closing.discard(served)
        self._past.setdefault(served.name, Done()).add(served.engine)
