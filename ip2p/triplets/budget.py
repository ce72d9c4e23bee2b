"""How much asking may cost and how fast it may go: both hold for all threads of one writer together.

Money is reserved before a request is sent, at the most that it can cost, and settled when the answer is there; so the
cap holds however many requests are under way. Prices have no currency: the cap is in theirs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ip2p.errors import WriterError

PER = 1_000_000
"""Prices are for so many tokens."""


class OverBudget(WriterError):
    """A request was not sent, since it could have cost more than is left."""


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost; 0 for a server of one's own."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / PER


class Budget:
    """``spent`` never goes over ``cap``; what is reserved counts as spent until it is settled."""

    def __init__(self, cap: float = math.inf, spent: float = 0.0):
        self.cap, self.spent = cap, spent
        self._reserved = 0.0
        self._lock = threading.Lock()

    def reserve(self, most: float) -> None:
        """Set ``most`` aside. Raises OverBudget where that is more than is left."""
        with self._lock:
            if most > 0 and self.spent + self._reserved + most > self.cap:
                raise OverBudget(
                    f"not asked: {self.spent + self._reserved:.4f} of {self.cap:g} are spent or reserved, and an "
                    f"answer may cost {most:.4f}; a higher --max-cost with --retry-errors goes on"
                )
            self._reserved += most

    def settle(self, reserved: float, cost: float) -> None:
        """The request has ended and cost so much."""
        with self._lock:
            self._reserved -= reserved
            self.spent += cost


class Pace:
    """At most ``per_minute`` requests a minute, evenly; 0: as many as come. ``pause`` holds everybody back."""

    def __init__(
        self,
        per_minute: float = 0.0,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.gap_s = 60.0 / per_minute if per_minute else 0.0
        self._sleep, self._clock = sleep, clock
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the caller may send its request."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self.gap_s
        if turn > now:
            self._sleep(turn - now)

    def pause(self, seconds: float) -> None:
        """No request begins within the next ``seconds``: the server has asked for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
