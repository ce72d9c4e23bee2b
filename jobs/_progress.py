"""Progress of a long job: a bar in a terminal, a line a minute elsewhere, JSON lines on request, nothing when quiet."""

from __future__ import annotations

import json
import sys
import threading
import time
import typing

LINE_EVERY_S = 60.0


class Progress:
    """Counts ``unit`` done out of ``total``; ``tell`` takes the counters to show beside them.

    ``skipped`` were done by an earlier run; they count as done, but not towards the rate. Use it as a context: inside
    of it a sign of life is given every ``every_s`` seconds, even where nothing gets done.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        skipped: int = 0,
        quiet: bool = False,
        as_json: bool = False,
        every_s: float = LINE_EVERY_S,
    ):
        self.total, self.unit, self.skipped, self.done = total, unit, skipped, 0
        self.as_json, self.silent, self.every_s = as_json, quiet and not as_json, every_s
        self.started = self.told = time.monotonic()
        self.counters: dict[str, typing.Any] = {}
        self.placed = False
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.bar: typing.Any = None
        if sys.stderr.isatty() and not (quiet or as_json):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=skipped, unit=f" {unit}", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        threading.Thread(target=self._heartbeat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.bar is not None:
            self.bar.close()

    def tell(self, more: int, **counters: typing.Any) -> None:
        """``more`` units are done; the counters are totals of this run."""
        with self.lock:
            self.done += more
            self.counters = counters
            if self.bar is not None:
                self.bar.set_postfix(counters, refresh=False)
                self.bar.update(more)
            elif self.as_json or self._is_time() or self.skipped + self.done >= self.total:
                self._write_line()

    def at(self, place: int, **counters: typing.Any) -> None:
        """Unit ``place`` is reached; what was done before the first call counts as an earlier run's.

        A place before the last one is taken back: something is done again.
        """
        if not self.placed:
            self.placed, self.skipped, self.started = True, place, time.monotonic()
            if self.bar is not None:
                self.bar.reset()
                self.bar.initial = place
                self.bar.update(place)
        else:
            self.tell(place - self.skipped - self.done, **counters)

    def say(self, text: str) -> None:
        """A remark between the lines; in JSON a line of its own. Kept back when quiet, but for errors."""
        if self.silent and not text.startswith("error"):
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(json.dumps({"note": text}) if self.as_json else text, file=sys.stderr, flush=True)

    def _heartbeat(self) -> None:
        while not self.ended.wait(min(1.0, self.every_s)):
            with self.lock:
                if self.bar is not None:
                    self.bar.refresh()  # its clock goes on
                elif self._is_time():
                    self._write_line()

    def _is_time(self) -> bool:
        return time.monotonic() - self.told >= self.every_s

    def _write_line(self) -> None:
        self.told = time.monotonic()
        if not self.silent:
            print(self._line(self.counters), file=sys.stderr, flush=True)

    def eta_s(self) -> float | None:
        """Seconds left at the rate so far; None before anything is done."""
        if not self.done:
            return None
        left = self.total - self.skipped - self.done
        return (time.monotonic() - self.started) / self.done * left

    def _line(self, counters: dict[str, typing.Any]) -> str:
        eta = self.eta_s()
        if self.as_json:
            known = {self.unit: self.skipped + self.done, "total": self.total, "eta_s": eta and round(eta), **counters}
            return json.dumps(known)
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counters.items())
        counts = f"{self.skipped + self.done}/{self.total} {self.unit}"
        return ", ".join(filter(None, (counts, said, f"{_clock(eta)} left")))


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
