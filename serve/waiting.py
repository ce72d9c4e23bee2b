"""Waiting for work as long as somebody waits for us, and saying things on the way (server-sent events)."""

from __future__ import annotations

import asyncio
import json
import typing
from collections.abc import AsyncIterator, Coroutine

from starlette.requests import Request
from starlette.responses import StreamingResponse

KEEP_ALIVE_S = 10.0
"""A stream that has nothing to say says so that often, or a proxy takes it for dead."""
KEEP_ALIVE = b": still here\n\n"  # a comment, which clients skip

T = typing.TypeVar("T")


class ClientGoneError(Exception):
    """The connection was closed before there was an answer."""


async def unless_gone(request: Request, work: Coroutine[typing.Any, typing.Any, T]) -> T:
    """The result of ``work``; cancelled, and ClientGoneError, where the client closes its connection first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """The answer that says ``events`` as they come."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})


def server_event(name: str, data: dict[str, typing.Any], number: int | None = None) -> bytes:
    """One server-sent event; ``number`` is what a client that comes back names in Last-Event-ID."""
    lines = [f"id: {number}"] if number is not None else []
    lines += [f"event: {name}", f"data: {json.dumps(data)}"]
    return ("\n".join(lines) + "\n\n").encode()
