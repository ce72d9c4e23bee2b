"""Writes completions through any OpenAI-compatible ``/completions`` endpoint (paper, section 3.1, which used one).

Sends the original's request, or a chat request where the server has only those. Three kinds of failure are kept apart:
the endpoint is away or refuses the key (the run stops and can be resumed; no caption is to blame), one caption gets no
answer (that row carries the error on), or the budget is spent (the row was not asked).
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
from dataclasses import dataclass
from typing import Any

from ip2p.config import Triplets
from ip2p.errors import RecipeError, WriterError
from ip2p.seeds import derive_seed, stable_id
from ip2p.triplets.answers import Answer, Answers
from ip2p.triplets.budget import Budget, OverBudget, Pace, Prices
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

    ``attempts`` counts the requests made for one completion, ``sleep`` is called with seconds between them. With
    ``messages``, which turns a prompt into a chat, the server is asked by /chat/completions. ``budget`` and ``pace``
    hold for all requests together; with ``answers`` each answer is kept the moment it is there. Raises RecipeError if
    the URL cannot be used, WriterError if the key cannot be sent.
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
        messages: Callable[[str], list[dict[str, str]]] | None = None,
        prices: Prices = Prices(),  # noqa: B008  frozen
        budget: Budget | None = None,
        pace: Pace | None = None,
        answers: Answers | None = None,
    ):
        self.triplets, self.seed, self.messages = triplets, seed, messages
        self.timeout_s, self.attempts, self.concurrency, self.sleep = timeout_s, attempts, concurrency, sleep
        self.prices, self.budget, self.pace = prices, budget or Budget(), pace or Pace(sleep=sleep)
        self.answers = answers
        self.url = _checked_url(triplets.http_url, "/chat/completions" if messages else "/completions")
        self._key = _checked_key()
        self._failed_rows = 0
        self._used: dict[tuple[object, ...], Answer] = {}
        self._opener = urllib.request.build_opener(_NoRedirects)

    def complete(self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]) -> list[str | WriterError]:
        """For each prompt a completion cut before STOP, or the error that this one row met.

        ``identities[i]`` seeds row i's request. What ``answers`` hold already is not asked again. Raises WriterError
        when the endpoint is away after all attempts, refuses the key or the model, or has failed 16 rows one after the
        other.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(self._completion, prompts, identities))
        for result in results:
            failed = isinstance(result, WriterError) and not isinstance(result, OverBudget)
            self._failed_rows = self._failed_rows + 1 if failed else 0
            if self._failed_rows >= FAILED_ROWS_IN_A_ROW:
                raise WriterError(f"{self._failed_rows} captions in a row got no answer; the last: {result}")
        return results

    def usage(self, identity: tuple[object, ...]) -> Answer:
        """What the request of ``identity`` came to, once: it is forgotten then. Known only with ``answers``."""
        return self._used.pop(identity, Answer(None))

    def _completion(self, prompt: str, identity: tuple[object, ...]) -> str | WriterError:
        known = self.answers.get(identity) if self.answers else None
        if known is not None and known.text is not None:
            self._used[identity] = known
            return known.text
        # A token has at least one byte; a chat template adds its own marks.
        most = self.prices.of(len(prompt.encode()) + (512 if self.messages else 8), self.triplets.max_tokens)
        bill = _Bill(most, before=known.cost if known else 0.0)
        try:
            return self._asked(prompt, identity, bill)
        except OverBudget as error:
            return error
        finally:
            if self.answers is not None:
                self._note(identity, bill, self.answers)

    def _note(self, identity: tuple[object, ...], bill: _Bill, answers: Answers) -> None:
        self._used[identity] = Answer(bill.text, *bill.usage, bill.before + bill.cost)
        if bill.text is None and self._used[identity].cost:
            answers.put(identity, self._used[identity])
        elif bill.text is None:
            answers.forget([identity])

    def _asked(self, prompt: str, identity: tuple[object, ...], bill: _Bill) -> str | WriterError:
        request = self._request(prompt, identity)
        for attempt in range(self.attempts):
            last = attempt == self.attempts - 1
            self.pace.wait()
            self.budget.reserve(bill.most)
            cost = bill.most  # what nobody knows the price of may have cost the most
            try:
                if self.answers is not None and bill.most:
                    self.answers.put(identity, Answer(None, cost=bill.before + bill.cost + bill.most))
                text, usage = self._answer(request)
                cost = self.prices.of(*usage) if usage else bill.most
                bill.text, bill.usage = text, usage or (0, 0)
                if self.answers is not None:
                    self.answers.put(identity, Answer(text, *bill.usage, bill.before + bill.cost + cost))
                return text
            except urllib.error.HTTPError as error:
                cost = 0.0
                message = self._refusal(error)
                if error.code < 500 and error.code != 429:
                    return WriterError(message)
                away, wait_s = error.code in _AWAY, _retry_after_s(error.headers.get("Retry-After"))
                if wait_s is not None:
                    self.pace.pause(wait_s)  # for all: the others would only be sent away too
            except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
                if isinstance(getattr(error, "reason", error), ConnectionRefusedError):
                    cost = 0.0
                message, away, wait_s = f"{self.url}: no answer ({_reason(error)})", True, None
            except _MalformedReply as error:
                message, away, wait_s = f"{self.url}: {error}", False, None
            finally:
                bill.cost += cost
                self.budget.settle(bill.most, cost)
            if not last and wait_s is None:
                self.sleep(_backoff_s(attempt))
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
        if self.messages:
            del body["prompt"]
            body["messages"] = self.messages(prompt)
        if not texts.http_model:
            del body["model"]
        headers = {
            "Content-Type": "application/json",
            # The same request again, after a cut line or a kill, can be known as such by servers that look at it.
            "Idempotency-Key": stable_id(self.seed, *identity, prompt),
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")

    def _answer(self, request: urllib.request.Request) -> tuple[str, tuple[int, int] | None]:
        """The text, cut before STOP, and the tokens of prompt and completion, if the server says how many."""
        with self._opener.open(request, timeout=self.timeout_s) as reply:
            data = reply.read(_MAX_REPLY_BYTES + 1)
        try:
            content = json.loads(data)
            choice = content["choices"][0]
            text = choice["message"]["content"] if self.messages else choice["text"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _MalformedReply("the answer is not a completion object") from error
        if not isinstance(text, str):
            raise _MalformedReply("the answer holds no text")
        return until_stop(text), _usage(content.get("usage"))

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


@dataclass
class _Bill:
    """What one completion costs: at ``most`` a request, ``before`` in earlier runs, ``cost`` in this one."""

    most: float
    before: float = 0.0
    cost: float = 0.0
    usage: tuple[int, int] = (0, 0)  # tokens of prompt and completion, of the request that was answered
    text: str | None = None


class _MalformedReply(Exception):
    """The server answered 200 with something else than a completion."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _usage(usage: object) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    whole = all(type(count) is int and count >= 0 for count in (prompt, completion))
    return (prompt, completion) if whole else None  # type: ignore[return-value]


def _checked_url(base: str, path: str) -> str:
    if not base:
        raise RecipeError("triplets.http_url is empty; name a server with --set triplets.http_url=http://HOST:PORT/v1")
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(f"triplets.http_url wants http:// or https:// and a host, got {base!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError("triplets.http_url takes no user, password or query; put the key in IP2P_LM_API_KEY")
    return base.rstrip("/") + path


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
