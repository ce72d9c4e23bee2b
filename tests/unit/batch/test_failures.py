"""What each error means for a batch, what is said of it, how long is waited and for how long."""

from __future__ import annotations

import pytest

from ip2p.batch.failures import (
    FATAL,
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    OWN,
    PASSING,
    Failure,
    failure_of,
    meaning_of,
    through_outages,
    wait_s,
)
from ip2p.errors import (
    CheckpointError,
    DeadlineError,
    DeviceError,
    EditError,
    EngineClosedError,
    InputError,
    JobError,
    PictureError,
    QueueFullError,
    StorageError,
    WriterError,
)

STAGES = ("read", "edit", "write")


@pytest.mark.parametrize(
    ("error", "read", "edit", "write"),
    [
        (StorageError("x", "missing"), OWN, OWN, FATAL),
        (StorageError("x", "denied"), OWN, OWN, FATAL),
        (StorageError("x", "name"), OWN, OWN, OWN),
        (StorageError("x", "refused"), FATAL, FATAL, FATAL),
        (StorageError("x", "full"), FATAL, FATAL, FATAL),
        (StorageError("x", "other"), PASSING, PASSING, FATAL),
        (StorageError("x"), PASSING, PASSING, FATAL),
        (DeviceError("x"), FATAL, FATAL, FATAL),
        (JobError("x"), FATAL, FATAL, FATAL),
        (InputError("x"), OWN, OWN, OWN),
        (PictureError("x", "format"), OWN, OWN, OWN),
        (CheckpointError("x"), OWN, OWN, OWN),
        (EditError("x"), PASSING, PASSING, PASSING),
        (DeadlineError("x"), PASSING, PASSING, PASSING),
        (QueueFullError("x", 1.0), PASSING, PASSING, PASSING),
        (EngineClosedError("x", 1.0), PASSING, PASSING, PASSING),
        (WriterError("x"), PASSING, PASSING, PASSING),
        (RuntimeError("x"), PASSING, PASSING, PASSING),
        (OSError("x"), PASSING, PASSING, PASSING),
        (MemoryError(), PASSING, PASSING, PASSING),
        (KeyError("x"), PASSING, PASSING, PASSING),
    ],
    ids=lambda value: type(value).__name__ + getattr(value, "kind", "") if isinstance(value, Exception) else None,
)
def test_what_an_error_means_at_each_stage(error, read, edit, write):
    assert tuple(meaning_of(error, stage) for stage in STAGES) == (read, edit, write)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PictureError("a.png: words", "format"), "unsupported_format", "a.png: words"),
        (PictureError("words", "size"), "picture_too_large", "words"),
        (PictureError("words", "damaged"), "damaged_picture", "words"),
        (PictureError("words"), "damaged_picture", "words"),
        (StorageError("words", "missing"), "not_found", "words"),
        (StorageError("words", "denied"), "access_denied", "words"),
        (StorageError("words", "name"), "invalid_request", "words"),
        (StorageError("words", "other"), "storage_error", "words"),
        (InputError("words"), "invalid_request", "words"),
        (EditError("words"), "edit_failed", "words"),
        (QueueFullError("words", 1.0), "edit_failed", "words"),
        (CheckpointError("words"), "edit_failed", "words"),
        (WriterError("words"), "internal_error", "WriterError: words"),
        (ValueError("words"), "internal_error", "ValueError: words"),
        (KeyError("words"), "internal_error", "KeyError: 'words'"),
        (MemoryError(), "internal_error", "MemoryError: MemoryError"),
        (InputError(""), "invalid_request", "InputError"),
    ],
    ids=lambda value: type(value).__name__ + getattr(value, "kind", "") if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_in_the_items_own_words(error, code, message, stage):
    assert failure_of(error, stage) == Failure(code, message, stage)


# ---- waiting


def test_waits_double_from_half_a_second_to_a_quarter_of_a_minute():
    assert (FIRST_WAIT_S, LONGEST_WAIT_S) == (0.5, 15.0)
    assert [wait_s(tries, lambda: 0.0) for tries in range(1, 9)] == [0.5, 1, 2, 4, 8, 15, 15, 15]


def test_chance_takes_up_to_half_of_a_wait():
    assert [wait_s(tries, lambda: 1.0) for tries in (1, 3, 9)] == [0.25, 1.0, 7.5]
    waits = {wait_s(4) for _ in range(50)}
    assert len(waits) > 40
    assert all(2 <= wait <= 4 for wait in waits)


@pytest.mark.parametrize("tries", [1000, 1100, 100_000])
def test_waits_stay_bounded_through_an_outage_of_hours(tries):
    assert LONGEST_WAIT_S / 2 <= wait_s(tries) <= LONGEST_WAIT_S


# ---- outages


class Clock:
    """Time that passes only by waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        self.waits: list[float] = []
        monkeypatch.setattr("ip2p.batch.failures.time.monotonic", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def away(times: float, then: object):
    """An action that finds the store away so many times; then it gives, or raises, ``then``."""
    left = [times]

    def action() -> object:
        if left[0] > 0:
            left[0] -= 1
            raise StorageError("the store is away", "away")
        if isinstance(then, Exception):
            raise then
        return then

    return action


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_store_that_comes_back_was_only_waited_for(clock):
    assert through_outages(away(0, "answer"), 60.0, clock.wait) == "answer"
    assert clock.waits == []
    assert through_outages(away(4, "answer"), 60.0, clock.wait) == "answer"
    assert len(clock.waits) == 4
    assert all(most / 2 <= wait <= most for wait, most in zip(clock.waits, (0.5, 1, 2, 4), strict=True))


def test_a_store_that_stays_away_is_given_up_after_that_long_with_its_own_words(clock):
    with pytest.raises(JobError, match=r"^gave up after 60 s: the store is away$") as caught:
        through_outages(away(float("inf"), ""), 60.0, clock.wait)
    assert isinstance(caught.value.__cause__, StorageError)
    assert 60 <= sum(clock.waits) <= 60 + LONGEST_WAIT_S


@pytest.mark.parametrize(
    "error", [StorageError("x", kind) for kind in ("missing", "denied", "refused", "full", "other")] + [ValueError("x")]
)
def test_every_other_error_comes_through_at_once(clock, error):
    for before in (0, 2):
        with pytest.raises(type(error)) as caught:
            through_outages(away(before, error), 60.0, clock.wait)
        assert caught.value is error
    assert len(clock.waits) == 2


def test_who_stops_the_waiting_is_not_held_up(clock):
    def stopped(seconds: float) -> None:
        raise JobError("the job was stopped")

    with pytest.raises(JobError, match="stopped"):
        through_outages(away(1, "answer"), 60.0, stopped)
