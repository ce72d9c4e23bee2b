"""How much of what a writer writes can be used: it parses, differs, is consistent, and is of the type asked for.

One completion a caption, no second try. This file asks and counts; what each word means is for acceptance.py,
edit_types.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ip2p.errors import WriterError
from ip2p.schema import Triplet
from ip2p.triplets.acceptance import judge
from ip2p.triplets.edit_types import EditTypes
from ip2p.triplets.format import prompt_of
from ip2p.triplets.stage import Writer


@dataclass(frozen=True)
class Written:
    """What came of one caption. ``reason`` is ``ok`` or the first thing that is wrong."""

    caption: str
    task: str  # the type that was asked for
    completion: str
    reason: str
    triplet: Triplet | None = None  # where the completion could be parsed into a usable one

    def as_record(self) -> dict[str, str]:
        """For a JSON line."""
        return {"caption": self.caption, "task": self.task, "completion": self.completion, "reason": self.reason}


def write_each(writer: Writer, captions: Sequence[tuple[str, str]], types: EditTypes) -> list[Written]:
    """One completion for each (caption, task), judged; the same captions draw the same random numbers each time."""
    prompts = [prompt_of(caption, task) for caption, task in captions]
    completions = writer.complete(prompts, [("valid rate", *captions[i], i) for i in range(len(captions))])
    return [
        written_of(caption, task, completion, types)
        for (caption, task), completion in zip(captions, completions, strict=True)
    ]


def written_of(caption: str, task: str, completion: str | WriterError, types: EditTypes) -> Written:
    """Judge one completion. Reasons are those of ``acceptance.judge`` and of ``types``, and writer_failed."""
    if isinstance(completion, WriterError):
        return Written(caption, task, str(completion), "writer_failed")
    triplet, reason = judge(caption, completion, None, 0)
    if triplet is not None:
        triplet, reason = types.labelled(triplet, task)
    return Written(caption, task, completion, reason, triplet)


def valid_rate(written: Sequence[Written]) -> dict[str, object]:
    """``valid_rate``, and the counts ``by_reason`` behind it."""
    reasons = Counter(one.reason for one in written)
    return {"valid_rate": round(reasons["ok"] / len(written), 4), "by_reason": dict(sorted(reasons.items()))}
