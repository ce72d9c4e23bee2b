"""What an error means for a batch: is it the item's own, will it pass, or can nobody go on?"""

from __future__ import annotations

import random
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass

from ip2p.errors import CheckpointError, DeviceError, EditError, InputError, JobError, PictureError, StorageError

T = typing.TypeVar("T")

OWN, PASSING, FATAL = "own", "passing", "fatal"
ATTEMPTS = 5
"""Of an item whose error may pass."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0


@dataclass(frozen=True)
class Failure:
    """``code`` is for programs, ``message`` for people; ``stage``: read, edit or write."""

    code: str
    message: str
    stage: str


def meaning_of(error: Exception, stage: str) -> str:
    """OWN: the item will never do. PASSING: try again, ATTEMPTS times. FATAL: every other item would fail like this.

    A store that is away is not looked at here (``through_outages``): no item is to blame.
    """
    if isinstance(error, StorageError):
        if error.kind == "name":
            return OWN
        if error.kind in ("refused", "full") or stage == "write":
            return FATAL
        return OWN if error.is_of_one_file else PASSING
    if isinstance(error, DeviceError | JobError):
        return FATAL
    if isinstance(error, InputError | CheckpointError):
        return OWN
    return PASSING


def failure_of(error: Exception, stage: str) -> Failure:
    """The item's own words for ``error``."""
    if isinstance(error, PictureError):
        code = {"format": "unsupported_format", "size": "picture_too_large"}.get(error.kind, "damaged_picture")
    elif isinstance(error, StorageError):
        known = {"missing": "not_found", "denied": "access_denied", "name": "invalid_request"}
        code = known.get(error.kind, "storage_error")
    elif isinstance(error, InputError):
        code = "invalid_request"
    elif isinstance(error, EditError | CheckpointError):
        code = "edit_failed"
    else:
        code = "internal_error"
    message = str(error) if str(error) else type(error).__name__
    return Failure(code, message if code != "internal_error" else f"{type(error).__name__}: {message}", stage)


def through_outages(action: Callable[[], T], outage_s: float, wait: Callable[[float], object] = time.sleep) -> T:
    """``action``, again while the store is away, ``outage_s`` seconds long; then raises JobError."""
    since: float | None = None
    turns = 0
    while True:
        try:
            return action()
        except StorageError as error:
            if error.kind != "away":
                raise
            turns += 1
            since = since or time.monotonic()
            if time.monotonic() - since > outage_s:
                raise JobError(f"gave up after {outage_s:g} s: {error}") from error
        wait(wait_s(turns))


def wait_s(tries: int, uniform: Callable[[], float] = random.random) -> float:
    """How long to wait after ``tries`` of them: twice as long each time, less a random share of up to a half."""
    doublings = min(tries - 1, 60)  # an outage of hours has more than a float can tell
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**doublings) * (1 - 0.5 * uniform())
