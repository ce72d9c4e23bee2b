"""What is known of edits that run in the background, as time goes by."""

from __future__ import annotations

import asyncio
import types
import typing

import pytest

from serve import edit_board
from serve.edit_board import LOST_AFTER_S, EditBoard, Record

KEPT_S = 100.0


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(edit_board, "time", types.SimpleNamespace(monotonic=lambda: made.now))
    return made


@pytest.fixture
def board(clock: Clock) -> EditBoard:
    return EditBoard(KEPT_S)


def told(board: EditBoard, status: str, name: str = "one", files: list[bytes] | None = None, **more: object) -> bool:
    record: Record = {"id": name, "status": status, **more}
    return asyncio.run(board.put(record, files))


def status(board: EditBoard, name: str = "one") -> str | None:
    record = asyncio.run(board.get(name))
    return None if record is None else record["status"]


def events(board: EditBoard, after: int = -1, name: str = "one") -> list[tuple[int, str]]:
    return [(number, event) for number, event, _ in asyncio.run(board.events(name, after))]


def files(board: EditBoard, name: str = "one") -> list[bytes]:
    return asyncio.run(board.files(name))


def test_the_newest_record_is_what_is_known(board: EditBoard) -> None:
    assert status(board) is None
    told(board, "queued")
    told(board, "in_progress")
    assert status(board) == "in_progress"


def test_each_change_is_an_event_with_a_number_of_its_own(board: EditBoard) -> None:
    told(board, "queued")
    told(board, "in_progress", steps_done=1)
    told(board, "in_progress", steps_done=1)  # nothing new
    told(board, "in_progress", steps_done=2)
    told(board, "completed", files=[b"picture"])
    assert events(board) == [
        (0, "edit.queued"),
        (1, "edit.in_progress"),
        (2, "edit.in_progress"),
        (3, "edit.completed"),
    ]
    assert events(board, after=1) == [(2, "edit.in_progress"), (3, "edit.completed")]
    assert events(board, after=3) == []


def test_events_of_a_long_edit_are_kept_to_the_newest_and_keep_their_numbers(board: EditBoard) -> None:
    for step in range(edit_board.EVENTS_KEPT + 10):
        told(board, "in_progress", steps_done=step)
    kept = events(board)
    assert len(kept) == edit_board.EVENTS_KEPT
    assert kept[0][0] == 10


def test_a_result_is_kept_for_its_time_and_then_forgotten_with_all_that_belongs_to_it(
    board: EditBoard, clock: Clock
) -> None:
    told(board, "completed", files=[b"picture"])
    asyncio.run(board.cancel("one"))
    clock.now += KEPT_S - 1
    assert (status(board), files(board)) == ("completed", [b"picture"])
    clock.now += 2
    assert (status(board), files(board), events(board)) == (None, [], [])
    assert not told(board, "queued")  # nor is the wish to cancel it remembered


def test_an_edit_under_way_is_not_forgotten_however_long_it_takes(board: EditBoard, clock: Clock) -> None:
    for _ in range(30):
        told(board, "in_progress")
        clock.now += LOST_AFTER_S - 1
    assert status(board) == "in_progress"
    assert clock.now > 1000 + KEPT_S


def test_an_edit_of_which_nothing_is_heard_is_lost_and_that_is_an_event(board: EditBoard, clock: Clock) -> None:
    told(board, "in_progress")
    clock.now += LOST_AFTER_S + 1
    record: typing.Any = asyncio.run(board.get("one"))
    assert (record["status"], record["error"]["code"]) == ("failed", "replica_lost")
    assert events(board) == [(0, "edit.in_progress"), (1, "edit.failed")]


def test_followers_learn_of_a_loss_without_asking_for_the_status(board: EditBoard, clock: Clock) -> None:
    told(board, "in_progress")
    clock.now += LOST_AFTER_S + 1
    assert events(board, after=0) == [(1, "edit.failed")]


def test_the_error_of_a_lost_edit_has_the_shape_of_all_errors(board: EditBoard, clock: Clock) -> None:
    told(board, "in_progress")
    clock.now += LOST_AFTER_S + 1
    record: typing.Any = asyncio.run(board.get("one"))
    assert set(record["error"]) == {"message", "type", "param", "code", "request_id"}


def test_an_edit_that_was_called_lost_stays_so_and_its_maker_is_told_to_stop(board: EditBoard, clock: Clock) -> None:
    told(board, "in_progress")
    clock.now += LOST_AFTER_S + 1
    assert status(board) == "failed"
    assert told(board, "in_progress") is True
    assert status(board) == "failed"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_an_edit_that_has_ended_is_never_lost(board: EditBoard, clock: Clock, end: str) -> None:
    told(board, end)
    clock.now += LOST_AFTER_S + 1
    assert status(board) == end


def test_the_wish_to_cancel_is_told_to_whoever_writes_next(board: EditBoard) -> None:
    assert told(board, "in_progress") is False
    asyncio.run(board.cancel("one"))
    assert told(board, "in_progress", name="another") is False
    assert told(board, "in_progress") is True


def test_results_that_are_too_many_bytes_are_forgotten_the_oldest_first(
    board: EditBoard, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_board, "KEPT_BYTES", 250)
    for name in ("first", "second", "third"):
        told(board, "completed", name, [bytes(50), bytes(50)])
        clock.now += 1
    assert (status(board, "first"), status(board, "second"), status(board, "third")) == (None, "completed", "completed")
    assert files(board, "third") == [bytes(50), bytes(50)]


def test_records_without_files_are_not_forgotten_to_make_room_for_bytes(
    board: EditBoard, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_board, "KEPT_BYTES", 250)
    told(board, "failed", "refused")
    clock.now += 1
    for name in ("first", "second", "third"):
        told(board, "completed", name, [bytes(100)])
        clock.now += 1
    assert status(board, "refused") == "failed"
