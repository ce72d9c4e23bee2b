"""Writing triplets at scale: the recipe of a run, and the stage that turns a shard of captions into judged rows.

Each caption is asked for one triplet or several, each of an edit type where shares are wanted; what is refused is asked
again, and every row leaves with its reason. This file paints nothing, and leaves files and the run as a whole (near
duplicates, shares) to written.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ip2p.config import Recipe
from ip2p.errors import InputError, RecipeError, WriterError
from ip2p.schema import Triplet
from ip2p.triplets.acceptance import Moderation, Window, is_blank, judge, judge_caption, normalised
from ip2p.triplets.answers import Answer
from ip2p.triplets.budget import OverBudget
from ip2p.triplets.captions import CaptionRow
from ip2p.triplets.edit_types import edit_types
from ip2p.triplets.format import prompt_of
from ip2p.triplets.judge import Judge
from ip2p.triplets.shares import asked_types, parse_shares
from ip2p.triplets.stage import Writer

Row = dict[str, Any]


@dataclass(frozen=True)
class Writing:
    """What comes out of ``jobs/datagen.py --stage triplets``, beside the recipe's ``triplets`` and ``seed``."""

    per_caption: int = 1  # triplets asked for each caption
    types: str = "open"  # open (the ten of docs/seed_triplets.md) | postcard | none
    shares: str = ""  # of types: even, or add=2,remove=1; "": as they come
    share_tolerance: float = 0.2  # types that came too often are cut down to this
    near_duplicate: float = 0.8  # Jaccard index of captions under one instruction; 0: keep all
    moderation: str = ""  # package.module:callable; True for texts that must not be used
    judge: str = ""  # "", lm (the writer's own model), http (the writer's server), or a model folder
    http_chat: int = 0  # 1: the server is asked by /chat/completions
    prompt_price: float = 0.0  # of a million tokens
    completion_price: float = 0.0
    captions_per_shard: int = 64  # worked on together and committed together


def check_writing(writing: Writing) -> None:
    """Raise RecipeError where a value cannot work, InputError where the moderation check cannot be found."""
    rules = (
        (writing.per_caption >= 1, "writing.per_caption must be at least 1"),
        (writing.captions_per_shard >= 1, "writing.captions_per_shard must be at least 1"),
        (0 <= writing.near_duplicate <= 1, "writing.near_duplicate lies in 0..1"),
        (0 < writing.share_tolerance < 1, "writing.share_tolerance lies between 0 and 1"),
        (writing.prompt_price >= 0 and writing.completion_price >= 0, "writing prices must be >= 0"),
        (not (writing.shares and writing.types == "none"), "writing.shares needs writing.types open or postcard"),
    )
    for holds, message in rules:
        if not holds:
            raise RecipeError(message)
    parse_shares(writing.shares, edit_types(writing.types).names)
    moderation_of(writing.moderation)


def moderation_of(name: str) -> Moderation | None:
    """The callable that ``package.module:name`` names, None for "". Raises InputError where there is none."""
    if not name:
        return None
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"writing.moderation: cannot find {name!r} ({error})") from error
    if not callable(found):
        raise InputError(f"writing.moderation wants package.module:callable, got {name!r}")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class WritingRun:
    """All that decides what a run writes."""

    recipe: Recipe
    writing: Writing

    def to_json(self) -> str:
        """The fields that matter to the texts; written as ``triplet_run.json`` beside them."""
        recipe = self.recipe
        fields = {"seed": recipe.seed, "triplet_lm": recipe.models.triplet_lm}
        fields |= {"triplets": dataclasses.asdict(recipe.triplets), "writing": dataclasses.asdict(self.writing)}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


@dataclass
class Request:
    """One triplet that is wanted, and what has come of it."""

    row: CaptionRow
    copy: int  # 0-based among those of one caption
    asked: str  # the edit type, or ""
    triplet: Triplet | None = None
    reason: str = ""
    error: str = ""
    attempts: list[int] = field(default_factory=list)  # numbers of the tries that were made
    refusals: Counter[str] = field(default_factory=Counter)
    verdict: str = ""

    def identity(self, attempt: int) -> tuple[object, ...]:
        """What makes the answer to this try its own."""
        return (self.row.prompt_id, self.copy, attempt)


class WriteRequests:
    """Called with the captions of a shard, returns a row for each triplet asked for (``written.SCHEMA``).

    Rows come in the order of captions and copies. ``window`` counts a text's tokens; ``usage`` says what the answer to
    a request used, for writers that cost money (a judge's share included).
    """

    def __init__(
        self,
        run: WritingRun,
        writer: Writer,
        window: Window | None,
        judge: Judge | None = None,
        usage: Callable[[tuple[object, ...]], Answer] | None = None,
    ):
        self.run, self.writer, self.window, self.judge, self.usage = run, writer, window, judge, usage
        self.flagged = moderation_of(run.writing.moderation)
        self.types = edit_types(run.writing.types)
        shares = parse_shares(run.writing.shares, self.types.names)
        # A writer that knows no types is not asked for any; the run's end sees to the shares.
        knows = getattr(getattr(writer, "manner", None), "tasks", True)
        self.cycle = asked_types(shares) if shares and knows else [""]

    def __call__(self, rows: Sequence[CaptionRow]) -> list[Row]:
        requests = [request for row in rows for request in self._requests(row)]
        usable = [request for request in requests if not self._bad_caption(request)]
        for attempt in range(self.run.recipe.triplets.tries):
            pending = [request for request in usable if request.reason != "ok" and not request.error]
            for request, completion in zip(pending, self._ask(pending, attempt), strict=True):
                request.attempts.append(attempt)
                self._settle(request, completion)
            self._refuse_repeated(requests)
        self._judge([request for request in requests if request.reason == "ok"])
        return [self._row(request) for request in requests]

    def _requests(self, row: CaptionRow) -> list[Request]:
        copies = self.run.writing.per_caption
        first = row.index * copies
        return [Request(row, copy, self.cycle[(first + copy) % len(self.cycle)]) for copy in range(copies)]

    def _bad_caption(self, request: Request) -> bool:
        reason = judge_caption(request.row.caption, self.window, self.run.recipe.triplets.text_window, self.flagged)
        request.reason = "" if reason == "ok" else reason
        return bool(request.reason)

    def _ask(self, requests: Sequence[Request], attempt: int) -> Sequence[str | WriterError]:
        if not requests:
            return []
        prompts = [prompt_of(request.row.caption, request.asked) for request in requests]
        return self.writer.complete(prompts, [request.identity(attempt) for request in requests])

    def _settle(self, request: Request, completion: str | WriterError) -> None:
        if isinstance(completion, WriterError):
            request.reason = "over_budget" if isinstance(completion, OverBudget) else "writer_failed"
            request.error = str(completion)
        else:
            request.triplet, request.reason = self._judged(request, completion)
        if request.reason != "ok":
            request.refusals[request.reason] += 1

    def _judged(self, request: Request, completion: str) -> tuple[Triplet | None, str]:
        if is_blank(completion):
            return None, "empty"
        limit = self.run.recipe.triplets.text_window
        triplet, reason = judge(request.row.caption, completion, self.window, limit, self.flagged)
        return self.types.labelled(triplet, request.asked) if triplet is not None else (None, reason)

    def _refuse_repeated(self, requests: Sequence[Request]) -> None:
        """Of one caption's triplets no two may have one instruction; the lower copy stays."""
        seen = set()
        for request in requests:
            if request.reason == "ok" and request.triplet is not None:
                key = (request.row.prompt_id, normalised(request.triplet.instruction))
                if key in seen:
                    request.reason = "near_duplicate"
                    request.refusals["near_duplicate"] += 1
                seen.add(key)

    def _judge(self, requests: Sequence[Request]) -> None:
        if self.judge is None:
            return
        triplets = [request.triplet for request in requests if request.triplet is not None]
        identities = [request.identity(request.attempts[-1]) for request in requests]
        for request, verdict in zip(requests, self.judge.verdicts(triplets, identities), strict=True):
            request.verdict = verdict

    def _row(self, request: Request) -> Row:
        row, triplet = request.row, request.triplet if request.reason == "ok" else None
        used = [self.usage(request.identity(attempt)) for attempt in request.attempts] if self.usage else []
        return {
            "prompt_id": row.prompt_id, "index": row.index, "copy": request.copy, "caption": row.caption,
            "url": row.url, "asked": request.asked, "instruction": triplet.instruction if triplet else "",
            "edited_caption": triplet.edited_caption if triplet else "", "task": triplet.task if triplet else "",
            "status": "accepted" if triplet else "error" if request.error else "refused", "reason": request.reason,
            "error": request.error, "tries": len(request.attempts),
            "refusals": json.dumps(dict(sorted(request.refusals.items()))),
            "verdict": request.verdict, "prompt_tokens": sum(answer.prompt_tokens for answer in used),
            "completion_tokens": sum(answer.completion_tokens for answer in used),
            "cost": sum(answer.cost for answer in used),
        }  # fmt: skip
