"""How long a UNet call of so many rows takes, measured; how many rows are worth putting into one; how long work takes.

Past some number of rows a device is full: more rows make a call longer and nobody faster. That knee is where the rows
per call are capped.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping

MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
KNEE_SHARE = 0.9
"""A call of this share of the best rows per second is full enough."""
FORGETTING = 0.1
"""How much a new measurement counts beside all before it."""


class StepCost:
    """Seconds by rows, from ``measured`` calls (at least one), corrected by every call that is run."""

    def __init__(self, measured: Mapping[int, float]):
        if not measured or min(measured) < 1 or min(measured.values()) <= 0:
            raise ValueError(f"calls of at least one row that took time are needed, got {dict(measured)}")
        self.seconds = dict(sorted(measured.items()))

    def knee(self, at_most: int | None = None) -> int:
        """The fewest rows with KNEE_SHARE of the best rows a second, of the sizes up to ``at_most``."""
        rates = {rows: rows / s for rows, s in self.seconds.items() if at_most is None or rows <= at_most}
        rates = rates or {min(self.seconds): 1.0}
        return min(rows for rows, rate in rates.items() if rate >= KNEE_SHARE * max(rates.values()))

    def of_call(self, rows: int) -> float:
        """Seconds of a call of ``rows`` rows: between the measured sizes a straight line, beyond them in proportion."""
        sizes = list(self.seconds)
        above = bisect.bisect_left(sizes, rows)
        if above == len(sizes):
            return self.seconds[sizes[-1]] * rows / sizes[-1]
        high = sizes[above]
        if above == 0 or high == rows:
            return self.seconds[high]
        low = sizes[above - 1]
        share = (rows - low) / (high - low)
        return self.seconds[low] * (1 - share) + self.seconds[high] * share

    def of_work(self, rows: int, per_call: int) -> float:
        """Seconds of ``rows`` rows in calls of ``per_call``: of the size that is run, whose cost is kept right."""
        return self.of_call(per_call) * rows / per_call

    def note(self, rows: int, seconds: float) -> None:
        """A call was run: the nearest measured size moves a little towards it."""
        nearest = min(self.seconds, key=lambda size: abs(size - rows))
        told = seconds * nearest / rows if rows > nearest else seconds
        self.seconds[nearest] += FORGETTING * (told - self.seconds[nearest])
