"""The engine with real threads: strangers that share calls, join, leave, are cancelled, fail, and harm nobody."""

from __future__ import annotations

import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ip2p.editing.edit_bank import EditBank
from ip2p.editing.edit_request import EditRequest
from ip2p.editing.editor import Editor
from ip2p.editing.engine import KEPT_BANKS, Edit, EditEngine, measured_cost
from ip2p.editing.step_cost import StepCost
from ip2p.errors import CheckpointError, DeadlineError, DeviceError, EditError, InputError, QueueFullError


def cost() -> StepCost:
    """The knee is at 24 rows; an engine corrects its table, so each has one of its own."""
    return StepCost({1: 0.01, 24: 0.05})


TEXTS = ["make it night", "add a moon", "turn it into a castle", "remove the boat"]
ALIKE = ("steps", "guidance_scale", "image_guidance_scale", "seed", "negative_prompt", "sampler", "resolution",
         "restore_size")  # fmt: skip


@pytest.fixture
def engine(edit_model) -> Iterator[EditEngine]:
    with EditEngine(edit_model, cost()) as made:
        yield made


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asked(seed: int = 0, **settings: typing.Any) -> EditRequest:
    return EditRequest(**{"image": picture(seed), "instruction": TEXTS[seed % 4], "steps": 4, "seed": seed, **settings})


def random_request(number: int) -> EditRequest:
    random = np.random.default_rng(number)
    sizes = [(16, 16), (16, 16), (9, 16), (32, 16)]
    return asked(
        number, image=picture(number, *sizes[random.integers(4)]), steps=int(random.integers(1, 12)),
        sampler=str(random.choice(["euler_ancestral", "dpmpp_2m"])),
        guidance_scale=float(random.choice([0.5, 1.0, 3.0, 7.5])),
        image_guidance_scale=float(random.choice([0.0, 1.0, 1.5, 3.0])), restore_size=bool(random.integers(2)),
        negative_prompt=str(random.choice(["", "snow"])), batch=bool(random.integers(2)),
    )  # fmt: skip


def alone(editor: Editor, request: EditRequest) -> np.ndarray:
    settings = {name: getattr(request, name) for name in ALIKE}
    return editor.edit([request.image], [request.instruction], **settings)[0]


def far_apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def held(engine: EditEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Steps wait until the event is set, so that what is submitted before is there together."""
    gate, step = threading.Event(), EditBank.step

    def waiting(bank: EditBank, slots: list[int]) -> None:
        if not gate.wait(20):
            gate.set()  # a test that failed before must not hold the engine for ever
        step(bank, slots)

    monkeypatch.setattr(EditBank, "step", waiting)
    return gate


def lost_device() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def short_of(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """No bank can be grown for edits of 40 steps: ``error`` instead."""
    grow = EditBank._grow

    def growing(bank: EditBank, slots: int, steps: int) -> None:
        if steps >= 40:
            raise error
        grow(bank, slots, steps)

    monkeypatch.setattr(EditBank, "_grow", growing)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_forty_edits_of_strangers_are_each_what_the_editor_makes_alone(edit_model, engine: EditEngine) -> None:
    requests = [random_request(number) for number in range(40)]

    def ask(number: int) -> Edit:
        time.sleep(number % 7 * 0.01)
        return engine.submit(requests[number])

    with ThreadPoolExecutor(8) as people:
        edits = list(people.map(ask, range(40)))
        pictures = [edit.future.result(60) for edit in edits]
    editor = Editor(edit_model)
    assert [number for number in range(40) if far_apart(pictures[number], alone(editor, requests[number])) > 1] == []
    assert engine.row_evals == sum(edit.rows for edit in edits) == editor.row_evals
    assert engine.calls < editor.row_evals / 3  # the calls were shared
    assert engine.ended == {"done": 40}
    assert engine.queued_s() == 0


def test_a_cancelled_edit_leaves_between_steps_and_runs_no_more(engine: EditEngine) -> None:
    begun = threading.Event()
    edit = engine.submit(asked(1, steps=500, guidance_scale=3.0), lambda one: begun.set())
    other = engine.submit(asked(2))
    assert begun.wait(20)
    assert edit.cancel()
    with pytest.raises(CancelledError):
        edit.future.result(20)
    other.future.result(20)
    until(lambda: engine.ended["cancelled"] == 1)
    assert engine.row_evals < 500 * 3 / 2
    assert 0 < edit.steps_done < 250


def test_an_edit_past_its_deadline_is_dropped_and_says_so(engine: EditEngine) -> None:
    edit = engine.submit(asked(1, steps=900, deadline_s=0.2))
    with pytest.raises(DeadlineError, match=r"deadline of 0\.2 s"):
        edit.future.result(20)
    assert engine.ended == {"late": 1}


def test_interactive_edits_go_before_batch_edits_that_came_earlier(engine: EditEngine, monkeypatch) -> None:
    gate, ended = held(engine, monkeypatch), []
    engine.cap = 3
    lanes = {f"batch {n}": engine.submit(asked(n, batch=True, guidance_scale=3.0)) for n in range(2)}
    until(lambda: engine._active and all(edit._prepared for edit in lanes.values()))
    lanes |= {f"person {n}": engine.submit(asked(n, steps=12, guidance_scale=3.0)) for n in range(2)}
    for name, edit in lanes.items():
        edit.future.add_done_callback(lambda _, name=name: ended.append(name))
    until(lambda: len(engine._edits) == 4 and all(edit._prepared for edit in lanes.values()))
    gate.set()
    for edit in lanes.values():
        edit.future.result(30)
    assert sorted(ended[:2]) == ["person 0", "person 1"]


def test_a_long_edit_that_has_waited_long_is_not_overtaken_after_each_of_its_steps(edit_model, monkeypatch) -> None:
    with EditEngine(edit_model, StepCost({1: 0.01, 3: 0.02})) as narrow:  # room for one edit a call
        gate = held(narrow, monkeypatch)
        first = narrow.submit(asked(0))
        long = narrow.submit(asked(1, steps=12))
        long.submitted_at -= 60
        short = [narrow.submit(asked(seed, steps=2)) for seed in range(2, 6)]
        until(lambda: all(edit._prepared is not None for edit in (first, long, *short)))
        gate.set()
        for edit in (first, long, *short):
            edit.future.result(30)
    assert long.ended_at is not None
    assert all(one.ended_at is not None and one.ended_at > long.ended_at for one in short)


def test_too_little_memory_halves_the_calls_and_every_edit_is_done(edit_model, engine: EditEngine, monkeypatch) -> None:
    step, refused = EditBank.step, []

    def small(bank: EditBank, slots: list[int]) -> None:
        if sum(bank.rows_of(slot) for slot in slots) > 6:
            refused.append(len(slots))
            raise torch.OutOfMemoryError("no room")
        step(bank, slots)

    monkeypatch.setattr(EditBank, "step", small)
    requests = [asked(seed, guidance_scale=3.0, steps=8) for seed in range(8)]
    edits = [engine.submit(request) for request in requests]
    pictures = [edit.future.result(30) for edit in edits]
    assert refused
    assert engine.cap <= 6 * 2
    editor = Editor(edit_model)
    assert all(far_apart(made, alone(editor, one)) <= 1 for made, one in zip(pictures, requests, strict=True))


def test_an_edit_that_fails_leaves_alone(edit_model, engine: EditEngine, monkeypatch) -> None:
    gate = held(engine, monkeypatch)
    requests = [asked(seed, steps=5) for seed in range(4)]
    edits = [engine.submit(request) for request in requests]
    through = EditBank.step

    def faulty(bank: EditBank, slots: list[int]) -> None:
        active = engine._active.get(edits[2]._shape, {})
        if any(active.get(slot) is edits[2] and bank.done[slot] == 3 for slot in slots):
            raise ValueError("a kernel said no")
        through(bank, slots)

    monkeypatch.setattr(EditBank, "step", faulty)
    gate.set()
    with pytest.raises(EditError, match="ValueError: a kernel said no"):
        edits[2].future.result(30)
    editor = Editor(edit_model)
    for place in (0, 1, 3):
        assert far_apart(edits[place].future.result(30), alone(editor, requests[place])) <= 1
    assert engine.ended == {"done": 3, "failed": 1}


def test_an_answer_that_is_no_number_is_the_error_of_its_edit_alone(engine: EditEngine, monkeypatch) -> None:
    edits = [engine.submit(asked(seed, steps=6)) for seed in range(3)]
    latent = EditBank.latent

    def poisoned(bank: EditBank, slot: int) -> torch.Tensor:
        return latent(bank, slot) * (float("nan") if slot == edits[1]._slot else 1.0)

    monkeypatch.setattr(EditBank, "latent", poisoned)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        edits[1].future.result(30)
    assert [edits[place].future.result(30).shape for place in (0, 2)] == [(16, 16, 3)] * 2


def test_a_full_queue_refuses_with_the_time_to_come_back(edit_model, monkeypatch) -> None:
    with EditEngine(edit_model, cost(), queue_limit_s=0.5) as engine:
        gate = held(engine, monkeypatch)
        first = engine.submit(asked(1, steps=100, guidance_scale=3.0))  # 300 rows: 0.625 s at the knee
        with pytest.raises(QueueFullError, match=r"0\.6 s of edits are waiting, the limit is 0\.5 s") as caught:
            engine.submit(asked(2))
        assert caught.value.retry_after_s == pytest.approx(0.125)
        gate.set()
        first.future.result(30)
        engine.submit(asked(2)).future.result(30)


def test_previews_come_evenly_spaced_and_before_the_end(engine: EditEngine) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def look(edit: Edit) -> None:
        if edit.preview is not None:
            seen.append((edit.steps_done, tuple(edit.preview.shape)))
            edit.preview = None

    engine.submit(asked(1, steps=12, previews=3), look).future.result(30)
    assert seen == [(3, (4, 8, 8)), (6, (4, 8, 8)), (9, (4, 8, 8))]


def test_closing_finishes_what_was_taken_in_and_takes_no_more(edit_model) -> None:
    engine = EditEngine(edit_model, cost())
    edits = [engine.submit(asked(seed, steps=9)) for seed in range(3)]
    engine.close()
    assert all(edit.future.done() for edit in edits)
    with pytest.raises(QueueFullError, match="closing"):
        engine.submit(asked(0))


def test_what_a_mask_keeps_is_the_original_to_the_bit(engine: EditEngine) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 15:] = 255
    request = asked(1, image=picture(1, 20, 30), mask=mask, restore_size=True, steps=3)
    edited = engine.submit(request).future.result(30)
    assert np.array_equal(edited[:, :15], request.image[:, :15])
    assert far_apart(edited[:, 15:], request.image[:, 15:]) > 20
    cut = engine.submit(asked(1, image=picture(1, 16, 16), mask=mask[:16, 7:23], steps=3)).future.result(30)
    assert np.array_equal(cut[:, :8], picture(1, 16, 16)[:, :8])


def test_an_empty_instruction_gives_the_picture_and_runs_nothing(engine: EditEngine) -> None:
    assert engine.submit(asked(1, instruction="  ", image=picture(1, 20, 30))).future.result(30).shape == (12, 16, 3)
    restored = asked(1, instruction="", image=picture(1, 20, 30), restore_size=True)
    assert np.array_equal(engine.submit(restored).future.result(30), restored.image)
    assert engine.row_evals == 0


def test_the_same_picture_and_text_are_encoded_once(engine: EditEngine) -> None:
    for seed in range(3):
        engine.submit(asked(seed, image=picture(1), instruction="add a moon", steps=1)).future.result(30)
    assert engine._preparer._latents.hits == 2
    assert engine._preparer._texts.hits == 4


def test_an_edit_that_asks_for_it_shares_no_call_and_repeats_to_the_bit(engine: EditEngine) -> None:
    first = engine.submit(asked(1, steps=8, alone=True, guidance_scale=3.0)).future.result(30)
    crowd = [engine.submit(asked(seed, steps=8)) for seed in range(4)]
    again = engine.submit(asked(1, steps=8, alone=True, guidance_scale=3.0))
    assert np.array_equal(again.future.result(30), first)
    for edit in crowd:
        edit.future.result(30)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 1001}, "steps must be at most 1000"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"picture of shape \(4, 4\), uint8"),
        ({"mask": np.zeros((8, 4), np.uint8)}, "mask of 4 x 8 pixels for a picture of 16 x 16"),
        ({"guidance_interval": (0.5, 0.2)}, "two rising shares"),
        ({"previews": -1}, "previews must be at least 0"),
        ({"deadline_s": 0.0}, "deadline_s must be above 0"),
        ({"sampler": "plms"}, "unknown sampler 'plms'"),
    ],
)
def test_requests_that_cannot_be_done_are_refused_at_once(engine: EditEngine, settings, said: str) -> None:
    with pytest.raises(InputError, match=said):
        engine.submit(asked(1, **settings))
    assert not engine._edits


def test_sizes_that_cannot_be_edited_are_refused_at_once(engine: EditEngine) -> None:
    with pytest.raises(InputError, match="sides of up to 8 to 1"):
        engine.submit(asked(1, image=picture(1, 4, 400)))
    with pytest.raises(InputError, match="size 13x16: both sides must be multiples of"):
        engine.submit(asked(1, size=(13, 16)))
    with pytest.raises(InputError, match="leave out resolution and restore_size"):
        engine.submit(asked(1, size=(16, 16), restore_size=True))
    assert engine.ended == {}
    assert engine.queued_s() == 0


def test_a_size_that_is_asked_for_is_cut_to(edit_model, engine: EditEngine) -> None:
    wide = picture(1, 16, 32)
    edited = engine.submit(asked(1, image=wide, size=(16, 16))).future.result(30)
    same = engine.submit(asked(1, image=wide[:, 8:24])).future.result(30)
    assert far_apart(edited, same) <= 1


def test_a_text_that_is_cut_is_known_to_be(engine: EditEngine) -> None:
    short, long = engine.submit(asked(1)), engine.submit(asked(1, instruction="night " * 100))
    for edit in (short, long):
        edit.future.result(30)
    assert (short.cut, long.cut) == (False, True)


def test_a_lost_device_ends_all_edits_and_takes_in_no_more(engine: EditEngine, monkeypatch) -> None:
    gate, begun, step = threading.Event(), threading.Event(), EditBank.step

    def lost(bank: EditBank, slots: list[int]) -> None:
        begun.set()
        gate.wait(20)
        bank._tensors.clear()  # nor can anything be read from it
        raise lost_device()

    monkeypatch.setattr(EditBank, "step", lost)
    edits = [engine.submit(asked(1)), engine.submit(asked(2, image=picture(2, 32, 16)))]
    assert begun.wait(20)
    gate.set()
    for edit in edits:
        with pytest.raises(DeviceError, match="another process must take over"):
            edit.future.result(20)
    assert not engine.works()
    monkeypatch.setattr(EditBank, "step", step)
    with pytest.raises(DeviceError):
        engine.submit(asked(3))


def test_an_edit_that_there_is_no_memory_for_ends_alone(edit_model, engine: EditEngine, monkeypatch) -> None:
    gate, requests = held(engine, monkeypatch), [asked(seed, steps=6) for seed in range(3)]
    edits = [engine.submit(request) for request in requests]
    until(lambda: any(engine._active.values()))
    with monkeypatch.context() as patched:
        short_of(patched, torch.OutOfMemoryError("no room"))
        large = engine.submit(asked(3, steps=40))
        gate.set()
        with pytest.raises(EditError, match="OutOfMemoryError: no room"):
            large.future.result(20)
    editor = Editor(edit_model)
    for edit, request in zip(edits, requests, strict=True):
        assert far_apart(edit.future.result(20), alone(editor, request)) <= 1
    engine.submit(asked(3, steps=40)).future.result(20)  # memory is there again
    until(lambda: engine.ended == {"failed": 1, "done": 4})


def test_a_device_lost_while_an_edit_is_taken_in_ends_all_edits(engine: EditEngine, monkeypatch) -> None:
    gate = held(engine, monkeypatch)
    short_of(monkeypatch, lost_device())
    edits = [engine.submit(asked(1, steps=30))]
    until(lambda: any(engine._active.values()))
    edits += [engine.submit(asked(seed, steps=40)) for seed in range(2)]
    until(lambda: all(edit._prepared for edit in edits))
    gate.set()
    for edit in edits:
        with pytest.raises(DeviceError, match=r"^cpu failed: .*another process must take over"):
            edit.future.result(20)


@pytest.mark.parametrize("error", [ValueError("the listener fell"), SystemExit("the listener fell")])
def test_progress_that_cannot_be_told_ends_its_edit_alone(edit_model, engine: EditEngine, monkeypatch, error) -> None:
    gate, requests = held(engine, monkeypatch), [asked(seed, steps=6) for seed in range(3)]

    def fall(edit: Edit) -> None:
        if edit.steps_done == 2:
            raise error

    edits = [engine.submit(request, fall if place == 1 else None) for place, request in enumerate(requests)]
    until(lambda: all(edit._prepared for edit in edits))
    gate.set()
    with pytest.raises(EditError, match=f"{type(error).__name__}: the listener fell"):
        edits[1].future.result(20)
    editor = Editor(edit_model)
    for place in (0, 2):
        assert far_apart(edits[place].future.result(20), alone(editor, requests[place])) <= 1
    assert engine.works()


def test_a_preview_that_there_is_no_memory_for_ends_its_edit_alone(engine: EditEngine, monkeypatch) -> None:
    def no_room(bank: EditBank, slot: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(EditBank, "estimate", no_room)
    watched, other = engine.submit(asked(1, steps=9, previews=2)), engine.submit(asked(2, steps=9))
    with pytest.raises(EditError, match="OutOfMemoryError: no room"):
        watched.future.result(20)
    other.future.result(20)
    assert engine.works()


def test_a_device_lost_under_a_preview_ends_all_edits(engine: EditEngine, monkeypatch) -> None:
    gate = held(engine, monkeypatch)

    def lost(bank: EditBank, slot: int) -> torch.Tensor:
        raise lost_device()

    monkeypatch.setattr(EditBank, "estimate", lost)
    edits = [engine.submit(asked(seed, steps=2, previews=1)) for seed in range(3)]
    until(lambda: all(edit._prepared for edit in edits))
    gate.set()
    for edit in edits:
        with pytest.raises(DeviceError, match=r"^cpu failed: "):
            edit.future.result(20)


def test_a_device_lost_in_the_search_for_the_edit_at_fault_is_asked_no_more(engine: EditEngine, monkeypatch) -> None:
    gate, calls = held(engine, monkeypatch), []
    edits = [engine.submit(asked(seed)) for seed in range(4)]
    until(lambda: all(edit._prepared for edit in edits))
    through = EditBank.step

    def failing(bank: EditBank, slots: list[int]) -> None:
        if len(slots) < 4 and not calls:  # they have not all come in yet
            through(bank, slots)
            return
        calls.append(len(slots))
        raise lost_device() if len(slots) == 1 else ValueError("a kernel said no")

    monkeypatch.setattr(EditBank, "step", failing)
    gate.set()
    for edit in edits:
        with pytest.raises(DeviceError, match=r"^cpu failed: "):
            edit.future.result(20)
    assert calls == [4, 1]


def test_what_nobody_foresaw_ends_all_edits_and_takes_in_no_more(engine: EditEngine, monkeypatch) -> None:
    gate, prepare, coming = held(engine, monkeypatch), engine._preparer.prepare, []
    edits = [engine.submit(asked(1)), engine.submit(asked(2, image=picture(2, 32, 16)))]
    until(lambda: all(edit._prepared for edit in edits))

    def slow(*given: typing.Any) -> typing.Any:
        coming.append(given)
        until(lambda: engine.broken)
        return prepare(*given)

    monkeypatch.setattr(engine._preparer, "prepare", slow)
    edits += [engine.submit(asked(3)), engine.submit(asked(4))]  # one is being prepared meanwhile, one has yet to be
    until(lambda: coming)
    monkeypatch.setattr("ip2p.editing.engine.chosen", lambda waiting, cap: 1 // 0)
    gate.set()
    for edit in edits:
        with pytest.raises(DeviceError, match=r"engine stopped: ZeroDivisionError.*another process must take over"):
            edit.future.result(20)
    assert not engine.works()
    with pytest.raises(DeviceError, match="engine stopped"):
        engine.submit(asked(5))
    until(lambda: engine.ended == {"failed": 4})
    assert len(coming) == 1  # nothing more is prepared in vain


def test_the_banks_of_the_last_sizes_are_kept_and_edits_of_others_have_the_same_bytes(engine: EditEngine) -> None:
    unit = engine._preparer.multiple

    def of_size(number: int, **settings: typing.Any) -> Edit:
        return engine.submit(asked(1, image=picture(1, 32, 32), size=(unit * number, 2 * unit), **settings))

    first = of_size(1).future.result(20)
    old, long = set(engine._banks), of_size(2, steps=400)
    for number in range(3, KEPT_BANKS + 6):
        of_size(number).future.result(20)
    assert not long.future.done()
    until(lambda: len(engine._banks) == KEPT_BANKS + 1)  # and that of the edit under way
    assert engine._banks.keys() == engine._active.keys()
    assert not old & engine._banks.keys()
    assert long._shape in engine._banks
    long.future.result(60)
    until(lambda: len(engine._banks) == KEPT_BANKS)
    assert long._shape in engine._banks  # the last used
    assert np.array_equal(of_size(1).future.result(20), first)


def test_calls_are_measured_by_their_rows(edit_model) -> None:
    measured = measured_cost(edit_model, (4, 8, 8), {1: 1, 4: 1})
    assert list(measured.seconds) == [1, 4]
    assert min(measured.seconds.values()) > 0
