"""What became of each item: records, written beside the outputs in parts that never change, and looked up by key.

A part holds the records of one chunk of items and is written after the chunk's outputs are, so that whatever has a
record need not be looked at again. Records are kept in a database on the local disk while a job runs: two million of
them are no matter of memory. An item may have several; a later part's stands.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import typing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ip2p.errors import DatasetError
from ip2p.seeds import stable_id
from ip2p.storage import Folder

PARTS = "_job/parts/"
DONE, FAILED = "done", "failed"
READERS = 16

Record = dict[str, typing.Any]
"""key, id, line, image, output, status; of done ones also fingerprint, seed, width, height, bytes, rows, seconds and
ended_at; of failed ones error (code, message, stage) and attempts."""


def part_name(number: int, records: Sequence[Record]) -> str:
    """Parts sort by ``number``; the name also says of which records it is, so that no two are ever confused."""
    return f"{PARTS}{number:012d}-{stable_id(*(record['key'] for record in records))}.jsonl"


def write_part(folder: Folder, number: int, records: Sequence[Record]) -> None:
    """Write ``records`` for good; what they speak of must be written already."""
    data = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
    folder.write(part_name(number, records), data.encode())


class Records:
    """All records of a job. For one thread; use it as a context."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="ip2p-batch-")
        self._table = sqlite3.connect(Path(self._place.name) / "records")
        self._read: set[str] = set()  # names of parts
        self._table.execute("pragma journal_mode = off")
        self._table.execute("pragma synchronous = off")
        self._table.execute("create table records (key text primary key, status text, attempts int, record text)")

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._place.cleanup()

    def load(self, folder: Folder, progress: Callable[[int], object] = lambda parts: None) -> int:
        """Read all parts of ``folder`` that were not read before; how many. Raises DatasetError for a damaged one."""
        names = [name for name in folder.list(PARTS) if name not in self._read]
        self._read.update(names)
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(names), 8 * READERS):
                window = names[start : start + 8 * READERS]
                for name, data in zip(window, readers.map(folder.read, window), strict=True):
                    self.add(_parsed(name, data))
                progress(len(window))
        return len(names)

    def add(self, records: Iterable[Record]) -> None:
        rows = ((one["key"], one["status"], one.get("attempts", 0), json.dumps(one)) for one in records)
        self._table.executemany(
            "insert into records values (?, ?, ?, ?) on conflict (key) do update set status = excluded.status, "
            "attempts = excluded.attempts, record = excluded.record where records.status != 'done'",
            rows,
        )

    def status(self, key: str) -> str:
        """done, failed, or empty where there is no record."""
        found = self._table.execute("select status from records where key = ?", (key,)).fetchone()
        return found[0] if found else ""

    def get(self, key: str) -> Record | None:
        found = self._table.execute("select record from records where key = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else None


def _parsed(name: str, data: bytes) -> list[Record]:
    try:
        records = [json.loads(line) for line in data.decode().splitlines()]
        if all(record["status"] in (DONE, FAILED) and record["key"] for record in records):
            return records
        problem = "a record without key or status"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DatasetError(f"{name}: found {problem}, expected records; delete this file and run the same command again")
