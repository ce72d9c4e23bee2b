"""Progress of a long job: a bar in a terminal, a line a minute elsewhere, JSON lines on request, nothing when quiet."""

from __future__ import annotations

import json
import sys
import time
import typing


class Progress:
    """Counts ``unit`` done out of ``total``; ``tell`` takes the counters to show beside them.

    ``skipped`` were done by an earlier run; they count as done, but not towards the rate.
    """

    def __init__(self, total: int, unit: str, skipped: int = 0, quiet: bool = False, as_json: bool = False):
        self.total, self.unit, self.skipped, self.done = total, unit, skipped, 0
        self.as_json, self.silent = as_json, quiet and not as_json
        self.started = self.told = time.monotonic()
        self.bar: typing.Any = None
        if sys.stderr.isatty() and not (quiet or as_json):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=skipped, unit=f" {unit}", dynamic_ncols=True)

    def tell(self, more: int, **counters: typing.Any) -> None:
        """``more`` units are done; the counters are totals of this run."""
        self.done += more
        if self.bar is not None:
            self.bar.set_postfix(counters, refresh=False)
            self.bar.update(more)
            return
        now = time.monotonic()
        if not self.silent and (self.as_json or now - self.told >= 60 or self.skipped + self.done >= self.total):
            self.told = now
            print(self._line(counters), file=sys.stderr, flush=True)

    def eta_s(self) -> float | None:
        """Seconds left at the rate so far; None before anything is done."""
        if not self.done:
            return None
        left = self.total - self.skipped - self.done
        return (time.monotonic() - self.started) / self.done * left

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line(self, counters: dict[str, typing.Any]) -> str:
        eta = self.eta_s()
        if self.as_json:
            known = {self.unit: self.skipped + self.done, "total": self.total, "eta_s": eta and round(eta), **counters}
            return json.dumps(known)
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counters.items())
        return f"{self.skipped + self.done}/{self.total} {self.unit}, {said}, {_clock(eta)} left"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
