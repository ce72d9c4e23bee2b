"""Batch edits on Ray: an actor that edits chunks, and the pool of them that grows, shrinks and outlives its members.

Actors pull: each has a few chunks at a time and gets the next one when one is done, so a fast actor does more. What an
actor was doing when it died is done again: first alone, so that whatever kills its worker takes nobody along, then item
by item, until the one that is to blame has been tried often enough.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ray

from ip2p.batch.attempts import note_attempt
from ip2p.batch.chunk_worker import ChunkDone, ChunkWorker, Editing
from ip2p.batch.failures import ATTEMPTS, through_outages
from ip2p.batch.item import Item
from ip2p.batch.records import FAILED, write_part
from ip2p.errors import DeviceError, Ip2pError, JobError
from ip2p.storage import Folder, open_folder
from jobs._ray import described, loaded

IN_FLIGHT = 2  # chunks an actor has: one being finished, one to go on with
DEATHS_IN_A_ROW = 8  # of actors, without a chunk done between them
DEATH_COUNTS = 2  # attempts: a worker that dies costs more than an error
LOOK_S = 0.5


@dataclass(frozen=True)
class WorkerSetup:
    """All that an actor needs to make its ChunkWorker."""

    output: str
    model: str
    ckpt: str
    dtype: str
    call_rows: int
    server: str = ""  # URL of a server that edits instead
    server_key: str = ""
    only_copy: bool = False
    device: str = "cpu"
    threads: int = 1
    fence: int = 1
    window: int = 32
    max_pixels: int = 16_000_000
    outage_s: float = 600.0
    allowed: tuple[str, ...] = ()

    def editing(self) -> Editing:
        from ip2p.batch.editing import CopyEditing, EngineEditing, ServerEditing

        if self.only_copy:
            return CopyEditing()
        if self.server:
            return ServerEditing(self.server, self.server_key)
        return EngineEditing(self.ckpt, self.dtype, self.device, self.call_rows, self.threads)

    def worker(self) -> ChunkWorker:
        return ChunkWorker(
            open_folder(self.output), self.model, self.editing(), fence=self.fence, window=self.window,
            max_pixels=self.max_pixels, outage_s=self.outage_s, allowed=self.allowed,
        )  # fmt: skip


class EditChunks:
    """The actor. What goes wrong is an answer, not an exception, so that it arrives as it was raised."""

    def __init__(self, setup: WorkerSetup):
        self.worker = loaded(setup.worker)

    def ready(self) -> Ip2pError | None:
        try:
            self.worker()
        except Ip2pError as error:
            return error
        return None

    def run(self, number: int, items: list[Item], attempts: list[int], look_first: bool) -> ChunkDone | Ip2pError:
        try:
            return self.worker().run(number, items, attempts, look_first)
        except DeviceError:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        except Ip2pError as error:
            return error
        except Exception as error:
            traceback.print_exc()
            return JobError(f"chunk {number}: {described(error)}")


@dataclass
class Chunk:
    """Items that one call of an actor does.

    ``look_first``: outputs may be there already. ``suspect``: a worker died over it, so it goes alone.
    """

    items: list[Item]
    attempts: list[int]
    look_first: bool = False
    suspect: bool = False
    deaths: int = 0

    @property
    def number(self) -> int:
        return self.items[0].line


@dataclass(eq=False)
class Member:
    """An actor of the pool."""

    actor: typing.Any
    started: typing.Any  # of its ready()
    since: float | None = None  # when it was ready
    chunks: dict[typing.Any, Chunk] = field(default_factory=dict)  # by what Ray will say when it is done
    row_evals: int = 0

    def has_room(self, chunk: Chunk) -> bool:
        if self.since is None or any(one.suspect for one in self.chunks.values()):
            return False
        return not self.chunks if chunk.suspect else len(self.chunks) < IN_FLIGHT


class Pool:
    """Actors for chunks; between ``size`` (min, max) of them.

    ``wanted`` says how many would be right now, given the seconds that workers have had so far in all; it is asked
    each time something happens. ``tell`` gets (members, members that are ready) when that changes.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        size: tuple[int, int],
        cpus: float,
        gpus: float,
        wanted: Callable[[float], int],
        tell: Callable[[int, int], object] = lambda members, ready: None,
    ):
        self.setup, self.size, self.wanted, self.tell = setup, size, wanted, tell
        self.members: list[Member] = []
        self.row_evals = 0
        self._past_seconds = 0.0  # of members that are gone
        self.folder: Folder = open_folder(setup.output)
        options: dict[str, typing.Any] = {"num_cpus": cpus, "num_gpus": gpus or None, "max_concurrency": IN_FLIGHT + 1}
        self._class: typing.Any = ray.remote(EditChunks).options(**options)  # type: ignore[attr-defined]
        self._waiting: collections.deque[Chunk] = collections.deque()
        self._deaths = 0
        self._told = (0, 0)

    def worker_seconds(self) -> float:
        """Since each member was ready, and of those that are gone."""
        ready = [member.since for member in self.members if member.since is not None]
        return self._past_seconds + sum(time.monotonic() - since for since in ready)

    def run(self, chunks: Iterator[Chunk]) -> Iterator[ChunkDone]:
        """Do all ``chunks``; yields what each came to, and an empty ChunkDone where nothing happened for LOOK_S.

        Raises the Ip2pError that stops the job.
        """
        more = True
        try:
            while True:
                while more and len(self._waiting) < IN_FLIGHT * max(1, len(self.members)):
                    chunk = next(chunks, None)
                    more = chunk is not None
                    if chunk is not None:
                        self._waiting.append(chunk)
                if not more and not self._waiting and not any(member.chunks for member in self.members):
                    return
                self._resize(more)
                yield from self._hand_out()
                yield from self._gather()
        finally:
            for member in list(self.members):
                self._retire(member)

    def _resize(self, more: bool) -> None:
        """Add actors while they are wanted; let one go that has nothing to do and will get nothing."""
        low, high = self.size
        wanted = self.wanted(self.worker_seconds()) if more else len(self._waiting)
        held = sum(bool(member.chunks) for member in self.members)
        target = min(high, max(wanted, held, low if more or self._waiting else 0, 1))
        while len(self.members) < target:
            actor = self._class.remote(self.setup)
            self.members.append(Member(actor, actor.ready.remote()))
        for member in sorted(self.members, key=lambda one: one.since is not None):  # those not ready yet go first
            if len(self.members) > target and not member.chunks:
                self._retire(member)
        now = (len(self.members), sum(member.since is not None for member in self.members))
        if now != self._told:
            self._told = now
            self.tell(*now)

    def _hand_out(self) -> Iterator[ChunkDone]:
        for _ in range(len(self._waiting)):
            chunk = self._waiting.popleft()
            if (done := self._given_up(chunk)) is not None:
                yield done
                continue
            free = [member for member in self.members if member.has_room(chunk)]
            if not free:
                self._waiting.append(chunk)
                continue
            member = min(free, key=lambda one: len(one.chunks))
            reference = member.actor.run.remote(chunk.number, chunk.items, chunk.attempts, chunk.look_first)
            member.chunks[reference] = chunk

    def _gather(self) -> Iterator[ChunkDone]:
        """What has been done since; waits a moment for something."""
        awaited: dict[typing.Any, Member] = {}
        for member in self.members:
            awaited |= dict.fromkeys(member.chunks, member)
            if member.since is None:
                awaited[member.started] = member
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=LOOK_S) if awaited else ([], [])
        if not ready:
            yield ChunkDone()
        for reference in ready:
            member = awaited[reference]
            if member not in self.members:
                continue  # died over another of them
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayActorError:
                self._bury(member)
                continue
            if isinstance(answer, Ip2pError):
                raise answer
            if reference == member.started:
                member.since = time.monotonic()
                continue
            del member.chunks[reference]
            self._deaths = 0
            self.row_evals += answer.row_evals - member.row_evals
            member.row_evals = answer.row_evals
            yield answer

    def _retire(self, member: Member) -> None:
        self.members.remove(member)
        if member.since is not None:
            self._past_seconds += time.monotonic() - member.since
        ray.kill(member.actor)

    def _bury(self, member: Member) -> None:
        """Its chunks go to others, as suspects."""
        self._retire(member)
        self._deaths += 1
        if self._deaths >= DEATHS_IN_A_ROW:
            raise JobError(
                f"{self._deaths} workers died one after the other and nothing was done between; read Ray's logs (out "
                "of memory? then fewer --rows-per-call, or fewer workers a machine), and run the same command again"
            )
        for chunk in member.chunks.values():
            self._suspect(chunk)

    def _suspect(self, chunk: Chunk) -> None:
        """Again alone; after a second death its items one by one; an item that has had its tries is given up."""
        chunk = dataclasses.replace(chunk, look_first=True, suspect=True, deaths=chunk.deaths + 1)
        if len(chunk.items) > 1:
            if chunk.deaths == 1:
                self._waiting.append(chunk)
            else:
                pairs = zip(chunk.items, chunk.attempts, strict=True)
                self._waiting += [Chunk([item], [tried], look_first=True, suspect=True) for item, tried in pairs]
            return
        item, tried = chunk.items[0], chunk.attempts[0] + DEATH_COUNTS
        self._through(lambda: note_attempt(self.folder, item.key(self.setup.model), tried))
        self._waiting.append(dataclasses.replace(chunk, attempts=[tried]))

    def _given_up(self, chunk: Chunk) -> ChunkDone | None:
        """Record a lone item that has killed workers too often; None for any other chunk."""
        if len(chunk.items) > 1 or chunk.attempts[0] < ATTEMPTS:
            return None
        item = chunk.items[0]
        error = {"code": "worker_died", "message": "its worker died over it again and again", "stage": "edit"}
        said = {"key": item.key(self.setup.model), "id": item.id, "line": item.line, "image": item.image}
        more = {"instruction": item.instruction, "output": item.output, "attempts": chunk.attempts[0]}
        record = {**said, **more, "status": FAILED, "error": error}
        self._through(lambda: write_part(self.folder, self.setup.fence, item.line, [record]))
        return ChunkDone(failed=1, reasons={"worker_died": 1})

    def _through(self, action: Callable[[], object]) -> None:
        through_outages(action, self.setup.outage_s)
