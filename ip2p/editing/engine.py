"""The edit engine: one thread that owns the device, and edits of strangers that share its UNet calls.

``submit`` may be called from any thread and gives an ``Edit`` at once. A picture is encoded, and a result decoded, in a
thread beside the steps; between steps edits join, leave, are cancelled, and give way to more urgent ones. What comes
out does not depend on who shared the calls (to 1/255): noise belongs to an edit's seed, and every number of an edit is
its own (``ip2p.editing.edit_bank``). What fails ends its own edit; what no later edit could survive ends them all, and
the engine (``broken``): nobody waits for what will not come. No web server and no Ray in here.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from ip2p.editing.edit_bank import EditBank, EditInputs
from ip2p.editing.edit_request import EditRequest, check_request
from ip2p.editing.preparation import Prepared, Preparer, finished_picture
from ip2p.editing.step_cost import MEASURED_ROWS, StepCost
from ip2p.editing.step_table import StepTable
from ip2p.editing.work_order import Waiting, chosen
from ip2p.errors import DeadlineError, DeviceError, EditError, EngineClosedError, Ip2pError, QueueFullError
from ip2p.models.components import EditModel
from ip2p.models.device_faults import is_device_fault, is_out_of_memory

SLEEP_S = 0.5  # the thread looks for cancelled edits at least so often
MAX_BATCH_EDITS = 64  # edits of the batch lane that hold memory at a time
# Latent sizes whose banks are kept with no edit in them, so that the next one need not make and grow them anew: square,
# upright and wide are what most pictures come as, and one more may come between. At 512 pixels a bank is 20 MB when
# new, and 0.45 GB once 64 edits of 100 steps have shared it.
KEPT_BANKS = 4


@dataclass(eq=False)
class Edit:
    """An edit under way. ``future`` gives the picture ``(H, W, 3)`` uint8, or raises an Ip2pError or CancelledError."""

    request: EditRequest
    rows: int  # UNet rows of all its steps
    on_progress: Callable[[Edit], object] | None = None  # after each of its steps, in the engine's thread: be quick
    future: Future[np.ndarray] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.monotonic)
    begun_at: float | None = None  # its first step
    ended_at: float | None = None  # its last
    steps_done: int = 0
    cut: bool = False  # its instruction or negative prompt is longer than the text encoder reads
    preview: torch.Tensor | None = None  # (C, h, w) latent of the newest preview; float32
    number: int = field(default_factory=itertools.count().__next__)
    _shape: tuple[int, ...] = ()
    _slot: int = -1
    _prepared: Prepared | None = None

    def cancel(self) -> bool:
        """Leave before the next step; False where the result is there already."""
        return self.future.cancel()

    @property
    def late(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and time.monotonic() - self.submitted_at > limit


class EditEngine:
    """Edits with ``model``. Use it as a context, or ``close`` it.

    ``cost`` says how many rows a call should have (``measured_cost``); ``queue_limit_s`` how many seconds of work may
    wait before ``submit`` refuses. With ``call_rows`` all calls have that many rows instead, and edits the same bytes
    whoever shares them (``ip2p.editing.fixed_calls``).
    """

    def __init__(
        self, model: EditModel, cost: StepCost, queue_limit_s: float = float("inf"), call_rows: int | None = None
    ):
        self.model, self.cost, self.queue_limit_s, self.call_rows = model, cost, queue_limit_s, call_rows
        self.cap = call_rows or cost.knee()
        self.calls = self.row_evals = 0
        self.broken: DeviceError | None = None  # nothing can be edited here any more: another process must take over
        self.ended: collections.Counter[str] = collections.Counter()  # done, cancelled, late, failed
        self._preparer = Preparer(model)
        self._banks: collections.OrderedDict[tuple[int, ...], EditBank] = collections.OrderedDict()  # last used last
        self._active: dict[tuple[int, ...], dict[int, Edit]] = {}
        self._arrived: collections.deque[Edit] = collections.deque()
        self._edits: set[Edit] = set()  # all that have not ended
        self._wake = threading.Condition()
        self._closing = False
        self._side = ThreadPoolExecutor(1, "ip2p-edit-side")
        self._thread = threading.Thread(target=self._run, name="ip2p-edit-steps", daemon=True)
        self._thread.start()

    def __enter__(self) -> EditEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: EditRequest, on_progress: Callable[[Edit], object] | None = None) -> Edit:
        """Take ``request`` in. Raises InputError for what cannot be done, QueueFullError where too much waits."""
        if self.broken is not None:
            raise self.broken
        check_request(request)
        self._preparer.check_size(request)
        table = self._preparer.table(request)
        edit = Edit(request, sum(table.rows), on_progress)
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closing and takes no more edits; ask another", retry_after_s=1.0)
            check_queue(self._seconds_left(), self.queue_limit_s)
            self._edits.add(edit)
        self._side.submit(self._prepare, edit, table)
        return edit

    def queued_s(self) -> float:
        """Seconds of work that is taken in and not done."""
        with self._wake:
            return self._seconds_left()

    def works(self) -> bool:
        """Whether it can still edit; if not, its process must be replaced."""
        return self._thread.is_alive() and self.broken is None

    def close(self) -> None:
        """Take no more edits, finish those that were taken in, and end the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._side.shutdown()

    # ---- beside the steps

    def _prepare(self, edit: Edit, table: StepTable) -> None:
        try:
            if self.broken is None and not edit.future.cancelled() and not edit.late:
                edit._prepared = self._preparer.prepare(edit.request, table)
                edit.cut = edit._prepared.cut
        except Exception as error:
            self._end(edit, error=error)
            return
        with self._wake:
            self._arrived.append(edit)
            self._wake.notify()

    def _finish(self, edit: Edit, latent: torch.Tensor | None) -> None:
        assert edit._prepared is not None
        try:
            self._end(edit, finished_picture(self.model, edit._prepared, latent))
        except Exception as error:
            self._end(edit, error=error)

    def _end(self, edit: Edit, picture: np.ndarray | None = None, error: BaseException | None = None) -> None:
        """Say how ``edit`` ended to whoever waits for it."""
        edit.ended_at = time.monotonic()
        edit._prepared = None
        if not edit.future.set_running_or_notify_cancel():
            outcome = "cancelled"
        elif error is None:
            outcome = "done"
            edit.future.set_result(typing.cast(np.ndarray, picture))
        else:
            outcome = "late" if isinstance(error, DeadlineError) else "failed"
            known = isinstance(error, Ip2pError)
            edit.future.set_exception(
                error if known else EditError(f"the edit failed: {type(error).__name__}: {error}")
            )
        with self._wake:
            self.ended[outcome] += 1
            self._edits.discard(edit)
            self._wake.notify()

    # ---- the thread that owns the device

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._closing and not self._edits:
                    return
                if not self._arrived and not any(self._active.values()):
                    self._wake.wait(SLEEP_S)
            try:
                self._turn()
            except BaseException as error:  # whatever it is: if this thread ended, edits would wait for ever
                self.broken = self.broken or _as_lost(error)

    def _turn(self) -> None:
        if self.broken is not None:
            self._give_up(self.broken)
            return
        self._let_in()
        self._let_out()
        self._step()
        self._drop_banks()

    def _give_up(self, broken: DeviceError) -> None:
        """End every edit that waits, and ask nothing of the device."""
        with self._wake:
            self._arrived.extend(edit for active in self._active.values() for edit in active.values())
        self._active.clear()
        self._banks.clear()
        while self._arrived:
            self._end(self._arrived.popleft(), error=broken)

    def _let_in(self) -> None:
        """Give arrived edits their slots; the batch lane as far as there is room for it."""
        with self._wake:
            arrived = list(self._arrived)
        held = sum(edit.request.batch for active in self._active.values() for edit in active.values())
        for edit in arrived:
            if not self._gone(edit):
                assert edit._prepared is not None
                inputs = edit._prepared.inputs
                if inputs is None:
                    self._side.submit(self._finish, edit, None)
                elif edit.request.batch and held >= MAX_BATCH_EDITS:
                    continue
                else:
                    held += self._placed(edit, inputs) and edit.request.batch
            with self._wake:
                self._arrived.remove(edit)  # not before somebody else answers for it

    def _placed(self, edit: Edit, inputs: EditInputs) -> bool:
        """Whether ``edit`` has got a slot; where there is none to be had, it has ended alone."""
        shape = tuple(inputs.image.shape)
        try:
            slot = self._bank(shape, tuple(inputs.text.shape)).add(inputs)
        except Exception as error:
            self._check_device(error)
            self._end(edit, error=error)
            return False
        edit._shape, edit._slot = shape, slot
        self._active[shape][slot] = edit
        return True

    def _let_out(self) -> None:
        """Drop the edits that nobody waits for any more."""
        for shape, active in self._active.items():
            for slot, edit in list(active.items()):
                if self._gone(edit):
                    self._leave(shape, slot)

    def _gone(self, edit: Edit) -> bool:
        if edit.future.cancelled():
            self._end(edit)
        elif edit.late:
            limit = edit.request.deadline_s
            self._end(edit, error=DeadlineError(f"not done within its deadline of {limit:g} s; nothing was returned"))
        else:
            return False
        return True

    def _step(self) -> None:
        """One UNet call for the most urgent edit, and others of its size beside it."""
        now = time.monotonic()
        edits = {edit.number: edit for active in self._active.values() for edit in active.values()}
        waiting = [self._waiting(edit, now) for edit in edits.values()]
        if waiting:
            shape = edits[chosen(waiting, 1)[0]]._shape
            beside = [one for one in waiting if edits[one.number]._shape == shape]
            self._call(shape, [edits[number]._slot for number in chosen(beside, self.cap)])

    def _waiting(self, edit: Edit, now: float) -> Waiting:
        bank, request = self._banks[edit._shape], edit.request
        rows, left = bank.rows_of(edit._slot), bank.left(edit._slot)
        return Waiting(edit.number, rows, left, now - edit.submitted_at, request.batch, request.alone)

    def _call(self, shape: tuple[int, ...], slots: list[int]) -> None:
        bank, started = self._banks[shape], time.monotonic()
        rows = sum(bank.rows_of(slot) for slot in slots)
        try:
            bank.step(slots)
        except Exception as error:
            self._after_failure(shape, slots, rows, error)
            return
        self.calls, self.row_evals = self.calls + 1, self.row_evals + rows
        self.cost.note(rows, time.monotonic() - started)
        for slot in slots:
            self._moved(shape, slot, started)

    def _after_failure(self, shape: tuple[int, ...], slots: list[int], rows: int, error: Exception) -> None:
        """Nothing has moved. Too little memory: smaller calls from now on. Anything else: find whose fault it is.

        Raises DeviceError where nothing can be edited here any more.
        """
        self._check_device(error)
        if self.call_rows and is_out_of_memory(error):
            # Smaller calls would give other bytes than were promised.
            message = f"calls of {self.call_rows} rows do not fit into memory ({error}); choose fewer a call"
            raise DeviceError(message) from error
        if len(slots) == 1:
            self._fail(shape, slots[0], error)
        elif is_out_of_memory(error):
            self.cap = max(1, rows // 2)
        else:
            for slot in slots:
                self._call(shape, [slot])

    def _check_device(self, error: BaseException) -> None:
        """Raise DeviceError where ``error`` means that the device is lost; if not, it is a matter of one edit."""
        if is_device_fault(error):
            raise DeviceError(f"{self.model.unet.device} failed: {error}; another process must take over") from error

    def _fail(self, shape: tuple[int, ...], slot: int, error: BaseException) -> None:
        edit = self._active[shape][slot]
        self._leave(shape, slot)
        self._end(edit, error=error)

    def _leave(self, shape: tuple[int, ...], slot: int) -> None:
        del self._active[shape][slot]
        self._banks[shape].remove(slot)
        self._banks.move_to_end(shape)

    def _moved(self, shape: tuple[int, ...], slot: int, started: float) -> None:
        bank, edit = self._banks[shape], self._active[shape][slot]
        edit.begun_at = edit.begun_at or started
        edit.steps_done = bank.done[slot]
        try:
            self._tell(edit, bank)
        except BaseException as error:  # ``on_progress`` is a stranger's and may raise anything
            self._check_device(error)
            self._fail(shape, slot, error)
            return
        if bank.rows_of(slot) == 0:
            self._leave(shape, slot)

    def _tell(self, edit: Edit, bank: EditBank) -> None:
        """Show how far ``edit`` is to whoever wants to know, and hand it on after its last step."""
        if _shows(edit.request.previews, edit.steps_done, edit.request.steps):
            edit.preview = bank.estimate(edit._slot)
        if edit.on_progress is not None:
            edit.on_progress(edit)
        if bank.rows_of(edit._slot) == 0:
            self._side.submit(self._finish, edit, bank.latent(edit._slot))

    def _bank(self, shape: tuple[int, ...], text_shape: tuple[int, ...]) -> EditBank:
        if shape not in self._banks:
            latent, text = typing.cast(tuple[int, int, int], shape), typing.cast(tuple[int, int], text_shape)
            self._banks[shape] = EditBank(
                self.model.unet, self.model.scheduler_config, latent, text, call_rows=self.call_rows
            )
            self._active[shape] = {}
        return self._banks[shape]

    def _drop_banks(self) -> None:
        """Of the banks with no edit in them, keep the KEPT_BANKS last used."""
        for shape in [shape for shape in self._banks if not self._active[shape]][:-KEPT_BANKS]:
            del self._banks[shape], self._active[shape]

    def _seconds_left(self) -> float:
        return self.cost.of_work(sum(self._left(edit) for edit in self._edits), self.cap)

    def _left(self, edit: Edit) -> int:
        return round(edit.rows * (1 - edit.steps_done / edit.request.steps))


def check_queue(waiting_s: float, limit_s: float) -> None:
    """Raise QueueFullError where more than ``limit_s`` seconds of work wait."""
    if waiting_s > limit_s:
        raise QueueFullError(
            f"{waiting_s:.1f} s of edits are waiting, the limit is {limit_s:g} s; try again later",
            retry_after_s=waiting_s - limit_s,
        )


def _as_lost(error: BaseException) -> DeviceError:
    """What to tell of ``error``, after which the engine does nothing any more."""
    if isinstance(error, DeviceError):
        return error
    lost = DeviceError(f"the engine stopped: {type(error).__name__}: {error}; another process must take over")
    lost.__cause__ = error
    return lost


def _shows(previews: int, done: int, steps: int) -> bool:
    """Whether the step that makes ``done`` is one of ``previews`` evenly spaced ones before the last."""
    if done >= steps:
        return False
    return (done * (previews + 1)) // steps > ((done - 1) * (previews + 1)) // steps


@torch.inference_mode()
def measured_cost(
    model: EditModel, latent_shape: tuple[int, int, int], sizes: Mapping[int, int] | None = None
) -> StepCost:
    """Seconds of a UNet call by rows, each size run once to warm up and then measured (``sizes``: rows to repeats)."""
    unet, channels = model.unet, latent_shape[0]
    window = model.text_encoder.config.max_position_embeddings
    measured = {}
    for rows, repeats in (sizes or dict.fromkeys(MEASURED_ROWS, 2)).items():
        sample = torch.zeros((rows, 2 * channels, *latent_shape[1:]), device=unet.device, dtype=unet.dtype)
        states = torch.zeros((rows, window, unet.config.cross_attention_dim), device=unet.device, dtype=unet.dtype)
        times = torch.full((rows,), 500.0, device=unet.device)
        seconds = []
        for _ in range(repeats + 1):
            started = time.monotonic()
            unet(sample, times, encoder_hidden_states=states).sample.sum().item()  # waits for the device
            seconds.append(time.monotonic() - started)
        measured[rows] = min(seconds[1:])
    return StepCost(measured)
