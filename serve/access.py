"""ASGI layers around every route: a request id, one log line, keys, a limit on bodies, and no error without its shape.

Written as plain ASGI, so that streams pass through untouched and a body is counted while it arrives.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import time
import typing
import uuid
from collections.abc import Awaitable, Callable, MutableMapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from serve.api_errors import ApiError, api_error
from serve.metrics import Metrics
from serve.settings import key_digest

log = logging.getLogger("ip2p.serve")

Scope = MutableMapping[str, typing.Any]
Message = MutableMapping[str, typing.Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/readyz")
# A line each: on one line Chromium reads the first alone, and never asks its user.
CHALLENGES = (
    ("www-authenticate", "Bearer"),
    ("www-authenticate", 'Basic realm="ip2p: any name, the key as password"'),
)
DRAINED_BYTES = 64 * 2**20
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
}


class RequestLog:
    """Gives each request an id (the caller's own where it is a plain word), logs it and counts it."""

    def __init__(self, app: App, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            # The router has put the route's pattern into the scope; a path of its own for every id would never end.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            took_ms = (time.monotonic() - started) * 1000
            log.info("%s %s %s %d %.0f ms%s", request_id, scope["method"], route, status, took_ms, _user(scope))


def _user(scope: Scope) -> str:
    """Who it was for, as a digest: the names that callers give their users are not ours to write down."""
    user = scope["state"].get("user")
    return f" user={key_digest(user).hex()[:16]}" if user else ""


class ErrorShape:
    """Answers whatever is raised below it, as long as no answer has begun."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except ClientDisconnect:  # in the middle of its upload: there is nobody to answer
            return
        except Exception as error:
            shown = api_error(error)
            if shown.status == 500:
                log.exception("%s failed", scope["state"]["request_id"])
            if begun:
                raise
            await error_response(shown, scope["state"]["request_id"])(scope, receive, send)


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    response = JSONResponse(error.body(request_id), error.status)
    for name, value in error.headers:
        response.headers.append(name, value)
    return response


class Keys:
    """Asks for a key on every path but the health checks, where keys are set.

    As ``Authorization: Bearer KEY``, or as the password of HTTP Basic, for which a browser asks its user.
    """

    def __init__(self, app: App, digests: frozenset[bytes]):
        self.app, self.digests = app, digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.digests and scope["path"] not in OPEN_PATHS:
            self._check(Headers(scope=scope).get("authorization", ""))
        await self.app(scope, receive, send)

    def _check(self, authorization: str) -> None:
        digest = key_digest(_key_in(authorization))
        # All are compared, each in constant time, so that the time says nothing of the keys.
        if not sum(hmac.compare_digest(digest, known) for known in self.digests):
            message = "no valid key; send Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message, None, CHALLENGES)


def _key_in(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        key = value.strip().encode("latin-1")  # as ASGI servers read headers
        return key.decode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes, counted as they come: a length that is claimed is only a claim.

    And those of which nothing comes for ``timeout_s`` seconds.
    """

    def __init__(self, app: App, limit: int, timeout_s: float):
        self.app, self.limit, self.timeout_s = app, limit, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        claimed = Headers(scope=scope).get("content-length", "0")
        if claimed.isdigit() and int(claimed) > self.limit:
            await self._refuse(receive, True)
        seen, more = 0, True

        async def received() -> Message:
            nonlocal seen, more
            # A body that stops coming would hold its memory, and the end of the server, for ever.
            message = await (self._in_time(receive) if more else receive())
            seen, more = seen + len(message.get("body", b"")), message.get("more_body", False)
            if seen > self.limit:
                await self._refuse(receive, more)
            return message

        await self.app(scope, received, send)

    async def _in_time(self, receive: Receive) -> Message:
        try:
            return await asyncio.wait_for(receive(), self.timeout_s)
        except TimeoutError as error:
            message = f"nothing of the body came for {self.timeout_s:g} s; send it again"
            raise ApiError(408, "body_timeout", message) from error

    async def _refuse(self, receive: Receive, more: bool) -> None:
        """Read on for a while first: a client that is still sending does not see an answer."""
        drained = 0
        while more and drained < DRAINED_BYTES:
            message = await self._in_time(receive)
            drained += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
        raise ApiError(413, "body_too_large", f"the body has more than {self.limit} bytes; send a smaller picture")
