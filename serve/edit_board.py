"""Where asynchronous edits stand, for every replica to read: what was asked to wait is not tied to one connection.

One board a server. Alone it is this object; on a cluster it is an actor of the same methods (``serve/app.py``), so that
any replica can answer for an edit that another one makes. Results are kept for a while and then forgotten.
"""

from __future__ import annotations

import time
import typing

from serve.api_errors import ApiError

LOST_AFTER_S = 15.0
"""An edit of which its replica says nothing for so long is lost with it."""
EVENTS_KEPT = 1024
Record = dict[str, typing.Any]
RUNNING = ("queued", "in_progress")
KEPT_BYTES = 256 * 2**20  # of results; the oldest are forgotten first


class EditBoard:
    """Not safe for several threads; its methods are coroutines so that an actor can stand in for it."""

    def __init__(self, kept_s: float):
        self.kept_s = kept_s
        self._records: dict[str, Record] = {}
        self._files: dict[str, list[bytes]] = {}
        self._events: dict[str, list[tuple[int, str, Record]]] = {}
        self._told_at: dict[str, float] = {}
        self._cancelled: set[str] = set()

    async def put(self, record: Record, files: list[bytes] | None = None) -> bool:
        """Write ``record`` under its ``id`` and tell those who follow it; True where it is to be cancelled."""
        name = record["id"]
        self._forget()
        known = self._records.get(name)
        if known is not None and known["status"] not in RUNNING:
            return True  # given up as lost, and its followers know that
        changed = self._records.get(name) != record
        self._records[name] = record
        self._told_at[name] = time.monotonic()
        if files is not None:
            self._files[name] = files
        if changed:
            events = self._events.setdefault(name, [])
            number = events[-1][0] + 1 if events else 0
            events.append((number, f"edit.{record['status']}", record))
            del events[:-EVENTS_KEPT]
        return name in self._cancelled

    async def get(self, name: str) -> Record | None:
        """The newest record, None where there is none (any more)."""
        self._forget()
        record = self._records.get(name)
        if record is None or record["status"] not in RUNNING:
            return record
        if time.monotonic() - self._told_at[name] > LOST_AFTER_S:
            lost = ApiError(503, "replica_lost", "the replica that made this edit is gone; send it again")
            record = {**record, "status": "failed", "error": lost.body(name)["error"]}
            await self.put(record)
        return record

    async def files(self, name: str) -> list[bytes]:
        """The pictures of a completed edit."""
        return self._files.get(name, [])

    async def events(self, name: str, after: int) -> list[tuple[int, str, Record]]:
        """Number, name and record of every event later than ``after``."""
        await self.get(name)
        return [event for event in self._events.get(name, []) if event[0] > after]

    async def cancel(self, name: str) -> None:
        """The replica that makes the edit learns of it the next time it writes."""
        self._cancelled.add(name)

    def _forget(self) -> None:
        ended = [name for name, record in self._records.items() if record["status"] not in RUNNING]
        held = sum(len(file) for files in self._files.values() for file in files)
        for name in sorted(ended, key=self._told_at.__getitem__):
            makes_room = held > KEPT_BYTES and name in self._files
            if makes_room or time.monotonic() - self._told_at[name] > self.kept_s:
                held -= sum(len(file) for file in self._files.pop(name, []))
                self._cancelled.discard(name)
                for kept in (self._records, self._events, self._told_at):
                    del kept[name]
