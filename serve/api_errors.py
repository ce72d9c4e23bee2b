"""One shape for every error: OpenAI's, so that its clients raise the class that is meant.

``{"error": {"message", "type", "param", "code", "request_id"}}``. 400 is for what can be mended in the request, 401 for
keys, 404 for what is not there, 413 and 415 for bodies and pictures that are too large or of another kind, 429 for a
full queue, 503 for a server that is not ready, 504 for a missed deadline.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence

from ip2p.errors import DeadlineError, DeviceError, InputError, Ip2pError, PictureError, QueueFullError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
LEAST_RETRY_MS = 100  # what is sooner only asks to be refused again
NO_RETRY = (("x-should-retry", "false"),)
PICTURE_STATUS = {
    "format": (415, "unsupported_image"),
    "size": (413, "image_too_large"),
    "damaged": (400, "invalid_image"),
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = tuple(headers)  # pairs, as one name may come twice

    def body(self, request_id: str) -> dict[str, typing.Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        known = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**known, "request_id": request_id}}


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What the library raised, as an answer. ``param``: the field that it was about, where that is known."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return queue_full(str(error), error.retry_after_s)
    if isinstance(error, DeadlineError):
        return ApiError(504, "deadline_exceeded", str(error), "deadline_ms", NO_RETRY)
    if isinstance(error, PictureError):
        status, code = PICTURE_STATUS[error.kind]
        return ApiError(status, code, str(error), param)
    if isinstance(error, DeviceError):
        return ApiError(503, "device_failed", "the accelerator failed; this replica is being replaced, try again")
    if isinstance(error, InputError):
        return ApiError(400, "invalid_value", str(error), param)
    if isinstance(error, Ip2pError):
        return ApiError(500, "edit_failed", "the edit failed; the log has more under this request_id", None, NO_RETRY)
    return ApiError(500, "internal_error", "the server failed; its log has more under this request_id")


def queue_full(message: str, retry_after_s: float) -> ApiError:
    """Come again in ``retry_after_s``: in milliseconds for OpenAI's clients, in whole seconds for all others."""
    after_ms = max(LEAST_RETRY_MS, math.ceil(retry_after_s * 1000))
    headers = (("retry-after-ms", str(after_ms)), ("retry-after", str(math.ceil(after_ms / 1000))))
    return ApiError(429, "queue_full", message, None, headers)
