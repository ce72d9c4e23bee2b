"""Edits that nobody stays connected for: ``Prefer: respond-async``, then status, events, content and cancel.

202 Accepted, Location: /v1/edits/{id}
GET  /v1/edits/{id}            queued | in_progress | completed | failed | cancelled, steps done, place of the result
GET  /v1/edits/{id}/events     server-sent events of the same, again from Last-Event-ID on
GET  /v1/edits/{id}/content    the picture (?index= for a variant)
POST /v1/edits/{id}/cancel     leave before the next step
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import typing
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.api_errors import ApiError, api_error
from serve.edit_board import RUNNING, EditBoard, Record
from serve.metrics import Metrics
from serve.settings import Settings
from serve.taking_in import Taken, details, files_of, finished, look
from serve.waiting import KEEP_ALIVE, KEEP_ALIVE_S, event_stream, server_event

TELL_EVERY_S = 0.25

log = logging.getLogger("ip2p.serve")


class EditJobs:
    """The asynchronous edits that this process makes, and what it knows of all others by the board."""

    def __init__(self, board: EditBoard, settings: Settings, metrics: Metrics):
        self.board, self.settings, self.metrics = board, settings, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, taken: Taken) -> Record:
        """Make ``taken`` in the background; returns the first record."""
        record = _record(f"edit-{secrets.token_hex(12)}", taken)
        await self.board.put(record)
        task = asyncio.create_task(self._make(record, taken))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return record

    async def drain(self) -> None:
        """Wait for the edits that are under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _make(self, record: Record, taken: Taken) -> None:
        work = asyncio.create_task(finished(taken, self.settings))
        while not work.done():
            await asyncio.wait({work}, timeout=TELL_EVERY_S)
            if not work.done() and await self.board.put(_progress(record, taken)):
                work.cancel()
                await asyncio.wait({work})
        await self.board.put(*await self._end(record, taken, work))

    async def _end(
        self, record: Record, taken: Taken, work: asyncio.Task[typing.Any]
    ) -> tuple[Record, list[bytes] | None]:
        now = _progress(record, taken)
        if work.cancelled():
            return {**now, "status": "cancelled"}, None
        error = work.exception()
        if error is not None:
            log.error("%s failed", record["id"], exc_info=error)
            return {**now, "status": "failed", "error": api_error(error).body(record["id"])["error"]}, None
        self.metrics.count(taken.edits)
        pictures = work.result()
        files = await files_of(taken, pictures)
        content = [f"/v1/edits/{record['id']}/content?index={place}" for place in range(len(files))]
        done = {"status": "completed", "content": content, **look(taken, pictures[0]), "ip2p": details(taken)}
        return {**now, **done}, files


def _record(name: str, taken: Taken) -> Record:
    steps = sum(edit.request.steps for edit in taken.edits)
    return {
        "id": name, "object": "edit", "status": "queued", "created": int(time.time()), "model": taken.served.name,
        "n": len(taken.edits), "steps": steps, "steps_done": 0,
    }  # fmt: skip


def _progress(record: Record, taken: Taken) -> Record:
    done = sum(edit.steps_done for edit in taken.edits)
    begun = any(edit.begun_at for edit in taken.edits)
    return {**record, "status": "in_progress" if begun else "queued", "steps_done": done}


def job_routes(jobs: EditJobs) -> APIRouter:
    """The routes below ``/v1/edits``."""
    routes, board = APIRouter(prefix="/v1/edits"), jobs.board

    async def known(name: str) -> Record:
        record = await board.get(name)
        if record is None:
            raise ApiError(404, "edit_not_found", f"no edit {name!r}; results are kept for a while only", "id")
        return record

    @routes.get("/{name}")
    async def status(name: str) -> JSONResponse:
        return JSONResponse(await known(name))

    @routes.get("/{name}/content")
    async def content(name: str, index: int = 0) -> Response:
        record = await known(name)
        if record["status"] != "completed":
            raise ApiError(409, "edit_not_completed", f"the edit is {record['status']}; ask for its status first")
        files = await board.files(name)
        if not 0 <= index < len(files):
            raise ApiError(400, "invalid_value", f"index must be from 0 to {len(files) - 1}", "index")
        return Response(files[index], media_type=f"image/{record['output_format']}")

    @routes.get("/{name}/events")
    async def events(name: str, request: Request) -> StreamingResponse:
        await known(name)
        last = request.headers.get("last-event-id", "")
        return event_stream(_followed(board, name, int(last) if re.fullmatch("[0-9]{1,18}", last) else -1))

    @routes.post("/{name}/cancel")
    async def cancel(name: str) -> JSONResponse:
        await known(name)
        await board.cancel(name)
        return JSONResponse(await known(name), 202)

    return routes


async def _followed(board: EditBoard, name: str, after: int) -> AsyncIterator[bytes]:
    """Events after number ``after``, up to the one that ends the edit."""
    quiet_since = time.monotonic()
    while True:
        now = await board.get(name)
        for number, event, record in await board.events(name, after):
            yield server_event(event, record, number)
            after = number
            if record["status"] not in RUNNING:
                return
            quiet_since = time.monotonic()
        if now is None or now["status"] not in RUNNING:
            return
        if time.monotonic() - quiet_since > KEEP_ALIVE_S:
            yield KEEP_ALIVE
            quiet_since = time.monotonic()
        await asyncio.sleep(TELL_EVERY_S)
