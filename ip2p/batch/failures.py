"""What an error means for a batch: is it the item's own, will it pass, or can nobody go on?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ip2p.errors import CheckpointError, DeviceError, EditError, InputError, PictureError, StorageError

OWN, PASSING, AWAY, FATAL = "own", "passing", "away", "fatal"
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
    """OWN: the item will never do. PASSING: try again, ATTEMPTS times. AWAY: try again, the item is not to blame.
    FATAL: every other item would fail like this."""
    if isinstance(error, StorageError):
        if error.kind == "away":
            return AWAY
        if error.kind in ("refused", "full") or stage == "write":
            return FATAL
        return OWN if error.kind in ("missing", "denied") else PASSING
    if isinstance(error, DeviceError):
        return FATAL
    if isinstance(error, InputError | CheckpointError):
        return OWN
    return PASSING


def failure_of(error: Exception, stage: str) -> Failure:
    """The item's own words for ``error``."""
    if isinstance(error, PictureError):
        code = {"format": "unsupported_format", "size": "picture_too_large"}.get(error.kind, "damaged_picture")
    elif isinstance(error, StorageError):
        code = {"missing": "not_found", "denied": "access_denied"}.get(error.kind, "storage_error")
    elif isinstance(error, InputError):
        code = "invalid_request"
    elif isinstance(error, EditError | CheckpointError):
        code = "edit_failed"
    else:
        code = "internal_error"
    message = str(error) if str(error) else type(error).__name__
    return Failure(code, message if code != "internal_error" else f"{type(error).__name__}: {message}", stage)


def wait_s(tries: int, uniform: Callable[[], float] = random.random) -> float:
    """How long to wait after ``tries`` of them: twice as long each time, less a random share of up to a half."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * (1 - 0.5 * uniform())
