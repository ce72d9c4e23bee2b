"""An HTTP proxy in front of an S3 server that does to requests what networks and stores do on their bad days."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import typing
from collections import Counter
from urllib.parse import unquote, urlsplit

from cluster.local_s3 import S3Place

MESSAGES = {
    "SlowDown": (503, "Please reduce your request rate."),
    "ExpiredToken": (403, "The provided token has expired."),
    "AccessDenied": (403, "Access Denied."),
    "NoSuchBucket": (404, "The specified bucket does not exist"),
}


class S3Proxy:
    """Listens on a free port while it is used as a context; what it does may be changed at any time.

    ``done`` counts what it did, ``written`` the writes that the store took, by key.
    """

    def __init__(self, upstream: S3Place, seed: int = 0, **faults: typing.Any):
        self.slow_down = self.cut = 0.0  # shares of requests
        self.only = ""  # a part of the keys that those two are for
        self.expired = self.forgetful = False  # keys are refused; conditions of writes are taken and not kept
        self.forbidden = self.unknown = "\0"  # writes to keys that begin so are refused; paths of no bucket
        vars(self).update(faults)
        self.upstream = upstream
        self.done: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        opening = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self._listener = asyncio.run_coroutine_threadsafe(opening, self._loop).result(10)
        port = self._listener.sockets[0].getsockname()[1]
        self.server = S3Place(f"http://127.0.0.1:{port}", self.upstream.bucket)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._listener.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
            headers = {line.split(b":", 1)[0].lower(): line.split(b":", 1)[1].strip() for line in lines[1:]}
            kept = [line for line in lines if not line.lower().startswith((b"expect:", b"connection:"))]
            if b"expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(headers.get(b"content-length", 0)))
            request = b"\r\n".join([*kept, b"Connection: close", b"", body])
            writer.write(await self._answer(request, *lines[0].decode().split()[:2]))
            await writer.drain()
        writer.close()

    async def _answer(self, request: bytes, method: str, target: str) -> bytes:
        """What the client is to see: an answer, the beginning of one, or nothing."""
        key = unquote(urlsplit(target).path).removeprefix(f"/{self.upstream.bucket}/")
        self.done["requests"] += 1
        if self.expired:
            return self._refused("ExpiredToken")
        if target.startswith(self.unknown):
            return self._refused("NoSuchBucket")
        if method == "PUT" and key.startswith(self.forbidden):
            return self._refused("AccessDenied")
        if self.only in key and self._random.random() < self.slow_down:
            return self._refused("SlowDown")
        cut = self.only in key and self._random.random() < self.cut
        way = self._random.choice(("request", "answer")) if cut else ""
        if way == "request":
            self.done["cut request"] += 1
            await self._passed_on(request[: self._random.randrange(len(request))], ended=True)
            return b""
        answer = await self._passed_on(request)
        status = answer.split(b" ", 2)[1:2]
        if method == "PUT" and status == [b"200"]:
            self.written[key] += 1
        if self.forgetful and status == [b"412"]:
            self.done["forgotten condition"] += 1
            return b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n'
        if way == "answer":
            self.done["cut answer"] += 1
            return answer[: self._random.randrange(max(1, len(answer)))]
        return answer

    def _refused(self, code: str) -> bytes:
        self.done[code] += 1
        status, message = MESSAGES[code]
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
        head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
        return f"{head}\r\nConnection: close\r\n\r\n{body}".encode()

    async def _passed_on(self, data: bytes, ended: bool = False) -> bytes:
        """What the server answers; empty where it is away or ``ended`` says that we are."""
        answer = b""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(self.upstream.endpoint).port)
            try:
                writer.write(data)
                await writer.drain()
                answer = b"" if ended else await reader.read()
            finally:
                writer.close()
        return answer
