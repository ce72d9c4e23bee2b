"""A job's stdout holds its own words alone: programs read its last line.

Ray prints there too, whatever `log_to_driver` says: that a worker died, from a thread of its own, and when the driver
leaves, what it held back as a repetition.
"""

from __future__ import annotations

import io
import sys
import threading
import typing


class OwnStdout(io.TextIOBase):
    """``inner`` for the thread that made this; what other threads write goes to stderr."""

    def __init__(self, inner: typing.TextIO):
        self.inner, self.owner = inner, threading.get_ident()

    @property
    def _sink(self) -> typing.TextIO:
        return self.inner if threading.get_ident() == self.owner else sys.stderr

    def write(self, text: str) -> int:
        return self._sink.write(text)

    def flush(self) -> None:
        self._sink.flush()

    def fileno(self) -> int:
        return self._sink.fileno()

    def isatty(self) -> bool:
        return self._sink.isatty()

    def writable(self) -> bool:
        return True


def keep_stdout() -> None:
    """Until the process ends, stdout is the calling thread's alone."""
    if not isinstance(sys.stdout, OwnStdout):
        sys.stdout = OwnStdout(sys.stdout)
