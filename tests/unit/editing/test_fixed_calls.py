"""Calls of one size: the same bytes whoever shares them, and a check that finds where that is not so."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ip2p.editing.edit_bank import EditBank
from ip2p.editing.edit_request import EditRequest
from ip2p.editing.engine import EditEngine
from ip2p.editing.fixed_calls import check_fixed_calls, filled_up
from ip2p.editing.step_cost import StepCost
from ip2p.errors import DeviceError, InputError

ROWS = 16


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads share out the rows of a picture this small, and on some machines each rounds in its own way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def request(number: int) -> EditRequest:
    random = np.random.default_rng(number)
    return EditRequest(
        image=random.integers(0, 256, (16, 16, 3), dtype=np.uint8), instruction="make it night", seed=number,
        steps=int(random.integers(1, 9)), guidance_scale=float(random.choice([1.0, 3.0])),
        image_guidance_scale=float(random.choice([1.0, 1.5])),
        sampler=str(random.choice(["euler_ancestral", "dpmpp_2m"])),
    )  # fmt: skip


def edited(edit_model, numbers: list[int], call_rows: int | None = ROWS) -> dict[int, bytes]:
    """All at once, in this order."""
    with EditEngine(edit_model, StepCost({1: 0.01}), call_rows=call_rows) as engine:
        edits = {number: engine.submit(request(number)) for number in numbers}
        return {number: edit.future.result(60).tobytes() for number, edit in edits.items()}


def test_an_edit_has_the_same_bytes_whoever_shares_its_calls(edit_model) -> None:
    together = edited(edit_model, list(range(20)))
    assert edited(edit_model, list(reversed(range(20)))) == together
    assert edited(edit_model, [3, 17, 4]) == {number: together[number] for number in (3, 17, 4)}
    assert edited(edit_model, [11]) == {11: together[11]}


def test_every_call_has_that_many_rows_and_only_those_that_count_are_counted(edit_model, monkeypatch) -> None:
    seen, forward = [], type(edit_model.unet).forward

    def watched(self, sample, *rest, **named):
        seen.append(len(sample))
        return forward(self, sample, *rest, **named)

    monkeypatch.setattr(type(edit_model.unet), "forward", watched)
    with EditEngine(edit_model, StepCost({1: 0.01}), call_rows=ROWS) as engine:
        edits = [engine.submit(request(number)) for number in range(12)]
        for edit in edits:
            edit.future.result(60)
        assert engine.row_evals == sum(edit.rows for edit in edits)
    assert set(seen) == {ROWS}


def test_too_little_memory_ends_an_engine_of_fixed_calls_with_what_to_do(edit_model, monkeypatch) -> None:
    called = threading.Event()

    def no_room(bank: EditBank, slots: list[int]) -> None:
        called.set()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EditBank, "step", no_room)
    with EditEngine(edit_model, StepCost({1: 0.01}), call_rows=ROWS) as engine:
        edit = engine.submit(request(1))
        with pytest.raises(DeviceError, match=r"calls of 16 rows do not fit into memory .* choose fewer a call"):
            edit.future.result(20)
        assert called.is_set()
        assert not engine.works()


def test_a_model_whose_rows_depend_on_their_neighbours_is_found_out(edit_model, monkeypatch) -> None:
    check_fixed_calls(edit_model, (4, 2, 2), ROWS)
    forward = type(edit_model.unet).forward

    def leaking(self, sample, *rest, **named):
        answer = forward(self, sample, *rest, **named)
        answer.sample = answer.sample + 1e-6 * answer.sample.mean()
        return answer

    monkeypatch.setattr(type(edit_model.unet), "forward", leaking)
    with pytest.raises(InputError, match="choose another number of rows"):
        check_fixed_calls(edit_model, (4, 2, 2), ROWS)


def test_a_call_is_filled_up_with_its_first_row() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert filled_up(rows, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
    assert filled_up(rows, 3) is rows
    assert filled_up(rows, 2) is rows
