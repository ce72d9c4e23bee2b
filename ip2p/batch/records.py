"""What became of each item: records, written beside the outputs in parts that never change, and looked up by key.

A part holds the records of one chunk of items and is written after the chunk's outputs are, so that whatever has a
record need not be looked at again. Records are kept in a database on the local disk while a job runs: two million of
them are no matter of memory. An item may have several, and an output may have been made of several items, one after
the other: what a later submission wrote stands.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ip2p.batch.places import PARTS
from ip2p.errors import DatasetError, StorageError
from ip2p.seeds import stable_id
from ip2p.storage import Folder

DONE, FAILED = "done", "failed"
READERS = 16

Record = dict[str, typing.Any]
"""key, id, line, image, output, status; of done ones also fingerprint, seed, width, height, bytes, rows, seconds and
ended_at; of failed ones error (code, message, stage) and attempts."""


def part_name(fence: int, number: int, records: Sequence[Record]) -> str:
    """Parts sort by the submission (its lease's ``fence``); two of different records never have one name."""
    return f"{PARTS}{fence:06d}-{number:012d}-{stable_id(*(record['key'] for record in records))}.jsonl"


def write_part(folder: Folder, fence: int, number: int, records: Sequence[Record]) -> None:
    """Write ``records`` for good; what they speak of must be written already."""
    data = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
    folder.write(part_name(fence, number, records), data.encode())


class Records:
    """All records of a job. For one thread; use it as a context."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="ip2p-batch-")
        self._table = sqlite3.connect(Path(self._place.name) / "records")
        self._read: set[str] = set()  # names of parts
        self._table.execute("pragma journal_mode = off")
        self._table.execute("pragma synchronous = off")
        self._table.execute("create table records (key text primary key, status text, output text, record text)")
        self._table.execute("create table outputs (name text primary key, key text)")  # of which item each is now

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._place.cleanup()

    def load(self, folder: Folder, progress: Callable[[int], object] = lambda parts: None) -> int:
        """Read all parts of ``folder`` that were not read before; how many. Raises DatasetError for a damaged one."""
        names = [name for name in folder.list(PARTS) if name not in self._read]
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(names), 8 * READERS):
                window = names[start : start + 8 * READERS]
                for name, data in zip(window, readers.map(folder.read, window), strict=True):
                    self.add(_parsed(name, data))
                    self._read.add(name)
                progress(len(window))
        return len(names)

    def add(self, records: Sequence[Record]) -> None:
        """Newer ones than all before. Raises StorageError where the local disk is full."""
        rows = [(one["key"], one["status"], one["output"], json.dumps(one)) for one in records]
        made = [(one["output"], one["key"]) for one in records if one["status"] == DONE]
        try:
            self._table.executemany("insert or replace into records values (?, ?, ?, ?)", rows)
            self._table.executemany("insert or replace into outputs values (?, ?)", made)
        except sqlite3.OperationalError as error:
            raise StorageError(f"{self._place.name}: {error}; free space there, or set TMPDIR", "full") from error

    def get(self, key: str) -> Record | None:
        """The newest record of the item ``key``; None where there is none, or where its output is another's by now."""
        query = (
            "select record, status, outputs.key from records left join outputs on name = output where records.key = ?"
        )
        found = self._table.execute(query, (key,)).fetchone()
        if found is None or (found[1] == DONE and found[2] != key):
            return None
        return typing.cast(Record, json.loads(found[0]))

    def status(self, key: str) -> str:
        """done, failed, or empty where there is no record."""
        record = self.get(key)
        return record["status"] if record else ""


def _parsed(name: str, data: bytes) -> list[Record]:
    try:
        records = [json.loads(line) for line in data.decode().splitlines()]
        if all(record["status"] in (DONE, FAILED) and record["key"] and record["output"] for record in records):
            return records
        problem = "a record without key, output or status"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DatasetError(f"{name}: found {problem}, expected records; delete this file and run the same command again")
