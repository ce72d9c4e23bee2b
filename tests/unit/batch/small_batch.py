"""A batch small enough for a test: pictures, items, what edits them or fails to, and folders that fail as told."""

from __future__ import annotations

import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ip2p.batch.item import EditSettings, Item, item_of
from ip2p.editing.edit_request import EditRequest
from ip2p.storage import LocalFolder
from tests.pictures import file_of, pixels

NOTHING = Item(0, "", "", "", "", EditSettings())
MODEL = "a model"
PATIENCE_S = 20.0


def until(holds: Callable[[], typing.Any], what: str = "") -> typing.Any:
    """What ``holds`` gives once that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.002)
    return found


def read(values: dict[str, object] | None = None, **fields: object) -> Item:
    """The item of a row that has an image and an instruction, and ``values`` and ``fields``."""
    return item_of({"image": "/in/a.png", "instruction": "make it night", **(values or {}), **fields}, 1, NOTHING)


def items_in(folder: Path, count: int, **fields: object) -> list[Item]:
    """Items whose pictures are written below ``folder``; each has its number as instruction."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        path = folder / f"{number}.png"
        path.write_bytes(file_of(pixels(number)))
        row = {"id": str(number), "image": str(path), "instruction": str(number), **fields}
        made.append(item_of(row, number + 1, NOTHING))
    return made


class Negative:
    """Edits by turning every colour round. Before that it fails as ``fails`` says: by instruction, an error a try."""

    def __init__(self, fails: dict[str, list[Exception]] | None = None):
        self.fails = fails or {}
        self.asked: list[EditRequest] = []
        self.row_evals = 0
        self.closed = False
        self._lock = threading.Lock()

    def edit(self, request: EditRequest) -> np.ndarray:
        with self._lock:
            self.asked.append(request)
            errors = self.fails.get(request.instruction, [])
            if errors:
                raise errors.pop(0)
            self.row_evals += 3
        return 255 - request.image

    def close(self) -> None:
        self.closed = True


class Gate:
    """An editor whose edits wait until they are let through; counts how many wait."""

    row_evals = 0

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.most = 0
        self.open = threading.Event()
        self._lock = threading.Lock()

    def edit(self, request: EditRequest) -> np.ndarray:
        with self._lock:
            self.inside.add(request.instruction)
            self.most = max(self.most, len(self.inside))
        assert self.open.wait(PATIENCE_S)
        with self._lock:
            self.inside.remove(request.instruction)
        return request.image

    def close(self) -> None:
        self.open.set()


class FailingFolder(LocalFolder):
    """A local folder whose calls fail as ``fails`` says, and which notes the names of all that was written.

    ``fails``: by method, the next errors; None is a call that goes well. Of a lost answer (``lose``), ``write_if``
    writes and says that it did not.
    """

    def __init__(self, root: Path, fails: dict[str, list[Exception | None]] | None = None):
        super().__init__(root)
        self.fails = fails or {}
        self.written: list[str] = []
        self.lose = 0
        self._lock = threading.Lock()

    def _next(self, method: str) -> None:
        with self._lock:
            errors = self.fails.get(method, [])
            error = errors.pop(0) if errors else None
        if error is not None:
            raise error

    def read(self, name: str) -> bytes:
        self._next("read")
        return super().read(name)

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        self._next("read_versioned")
        return super().read_versioned(name)

    def write_from(self, name: str, stream: typing.BinaryIO) -> None:
        self._next("write")
        super().write_from(name, stream)
        self.written.append(name)

    def write_if(self, name: str, data: bytes, version: str | None = None) -> str | None:
        self._next("write_if")
        written = super().write_if(name, data, version)
        with self._lock:
            if written is not None and self.lose:
                self.lose -= 1
                return None
        return written
