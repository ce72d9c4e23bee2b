"""Writes completions through any OpenAI-compatible ``/completions`` endpoint (paper, section 3.1, which used one).

Sends the original's request. Three kinds of failure are kept apart: the endpoint is away or refuses the key (the run
stops and can be resumed; no caption is to blame), or one caption gets no answer (that row carries the error on).
The key comes from the environment and never appears in a message. This file does not parse completions.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ip2p.config import Triplets
from ip2p.errors import RecipeError, WriterError
from ip2p.seeds import derive_seed
from ip2p.triplets.format import STOP, until_stop

TIMEOUT_S = 60.0
ATTEMPTS = 5
CONCURRENCY = 8
LONGEST_WAIT_S = 60.0
FAILED_ROWS_IN_A_ROW = 16
"""After so many rows without an answer in between, the fault is not the captions'."""
_MAX_REPLY_BYTES = 1 << 20
_AWAY = (429, 502, 503, 504)
_REMEDIES = {
    401: "set IP2P_LM_API_KEY (or OPENAI_API_KEY) to a key that this server takes",
    403: "the key lacks the right to use this model; use another key or model",
    404: "check triplets.http_url (it usually ends in /v1) and triplets.http_model",
}


class HttpWriter:
    """Asks ``triplets.http_url`` for completions, a few at a time.

    ``attempts`` counts the requests made for one completion, ``sleep`` is called with seconds between them. Raises
    RecipeError if the URL cannot be used, WriterError if the key cannot be sent.
    """

    def __init__(
        self,
        triplets: Triplets,
        seed: int,
        *,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
        concurrency: int = CONCURRENCY,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self.triplets, self.seed = triplets, seed
        self.timeout_s, self.attempts, self.concurrency, self.sleep = timeout_s, attempts, concurrency, sleep
        self.url = _checked_url(triplets.http_url)
        self._key = _checked_key()
        self._failed_rows = 0
        self._opener = urllib.request.build_opener(_NoRedirects)

    def complete(self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]) -> list[str | WriterError]:
        """For each prompt a completion cut before STOP, or the error that this one row met.

        ``identities[i]`` seeds row i's request. Raises WriterError when the endpoint is away after all attempts,
        refuses the key or the model, or has failed 16 rows one after the other.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(self._completion, prompts, identities))
        for result in results:
            self._failed_rows = self._failed_rows + 1 if isinstance(result, WriterError) else 0
            if self._failed_rows >= FAILED_ROWS_IN_A_ROW:
                raise WriterError(f"{self._failed_rows} captions in a row got no answer; the last: {result}")
        return results

    def _completion(self, prompt: str, identity: tuple[object, ...]) -> str | WriterError:
        request = self._request(prompt, identity)
        for attempt in range(self.attempts):
            last = attempt == self.attempts - 1
            try:
                return self._answer(request)
            except urllib.error.HTTPError as error:
                message = self._refusal(error)
                if error.code < 500 and error.code != 429:
                    return WriterError(message)
                away, wait_s = error.code in _AWAY, _retry_after_s(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
                message, away, wait_s = f"{self.url}: no answer ({_reason(error)})", True, None
            except _MalformedReply as error:
                message, away, wait_s = f"{self.url}: {error}", False, None
            if not last:
                self.sleep(_backoff_s(attempt) if wait_s is None else wait_s)
        if away:
            raise WriterError(f"{message}; asked {self.attempts} times; when it is back, run the same command again")
        return WriterError(f"{message}; asked {self.attempts} times")

    def _request(self, prompt: str, identity: tuple[object, ...]) -> urllib.request.Request:
        texts = self.triplets
        body: dict[str, Any] = {
            "model": texts.http_model, "prompt": prompt, "temperature": texts.temperature, "top_p": texts.top_p,
            "max_tokens": texts.max_tokens, "frequency_penalty": texts.frequency_penalty,
            "presence_penalty": texts.presence_penalty, "stop": [STOP],
            "seed": derive_seed(self.seed, *identity) % 2**31,  # servers keep it in 32 bits
        }  # fmt: skip
        if not texts.http_model:
            del body["model"]
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")

    def _answer(self, request: urllib.request.Request) -> str:
        with self._opener.open(request, timeout=self.timeout_s) as reply:
            data = reply.read(_MAX_REPLY_BYTES + 1)
        try:
            text = json.loads(data)["choices"][0]["text"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _MalformedReply("the answer is not a completion object") from error
        if not isinstance(text, str):
            raise _MalformedReply("the answer holds no text")
        return until_stop(text)

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """What the server said, without the key; raises WriterError where no other request would fare better."""
        try:
            excerpt = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        except (OSError, http.client.HTTPException):  # it hung up in the middle of its explanation
            excerpt = ""
        if self._key:
            excerpt = excerpt.replace(self._key, "***")
        message = f"{self.url}: HTTP {error.code} {excerpt}".rstrip()
        if error.code in _REMEDIES or error.code < 400:
            remedy = _REMEDIES.get(error.code, "the server redirects; put the final address in triplets.http_url")
            raise WriterError(f"{message}; {remedy}")
        return message


class _MalformedReply(Exception):
    """The server answered 200 with something else than a completion."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _checked_url(base: str) -> str:
    if not base:
        raise RecipeError("triplets.http_url is empty; name a server with --set triplets.http_url=http://HOST:PORT/v1")
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(f"triplets.http_url wants http:// or https:// and a host, got {base!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError("triplets.http_url takes no user, password or query; put the key in IP2P_LM_API_KEY")
    return base.rstrip("/") + "/completions"


def _checked_key() -> str:
    key = (os.environ.get("IP2P_LM_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not key.isascii() or not key.isprintable():
        # http.client's own error would print the key.
        raise WriterError("IP2P_LM_API_KEY (or OPENAI_API_KEY) has characters that a header cannot hold; set it again")
    return key


def _retry_after_s(value: str | None) -> float | None:
    """Seconds that the server asks to wait (a number or a date), at most a minute; None if it says nothing usable."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        now = datetime.datetime.now(until.tzinfo)
        seconds = (until - now).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else None  # NaN


def _backoff_s(attempt: int) -> float:
    # Jitter spreads the workers out; it only moves time, never a result.
    return min(2.0**attempt, LONGEST_WAIT_S / 2) * random.uniform(0.5, 1.5)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__
