"""Reads the type of an edit off a triplet's words: naive Bayes over words, neighbours and changes, from the seeds.

A second opinion on whether a writer did what was asked, and the label of what a writer without types wrote. Of seed
rows that it has not seen it names the author's type in 75 of 100, and has it among its first two in 86 (ten-fold;
tests/unit/triplets/test_task_reader.py). It is no judge of whether an edit makes sense.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from ip2p.schema import Triplet
from ip2p.triplets.acceptance import normalised
from ip2p.triplets.consistency import stems

SMOOTHING = 0.3
GOOD_PLACES = 2
"""A type counts as right if it is among so many of the likeliest: the types of open-ended edits overlap."""


class TaskReader:
    """Learns from labelled triplets at once; ``ranked`` then names types, the likeliest first."""

    def __init__(self, triplets: Sequence[Triplet]):
        sizes = Counter(triplet.task for triplet in triplets)
        counts: dict[str, Counter[str]] = {task: Counter() for task in sizes}
        for triplet in triplets:
            counts[triplet.task].update(set(_features(triplet)))
        known = {feature for counter in counts.values() for feature in counter}
        self._log_shares = {
            feature: {
                task: math.log((counter[feature] + SMOOTHING) / (sizes[task] + 2 * SMOOTHING))
                for task, counter in counts.items()
            }
            for feature in known
        }
        self._priors = {task: math.log(size / len(triplets)) for task, size in sizes.items()}

    def ranked(self, triplet: Triplet) -> list[str]:
        """All types that it knows, the likeliest first."""
        scores = dict(self._priors)
        for feature in sorted(set(_features(triplet))):
            for task, share in self._log_shares.get(feature, {}).items():
                scores[task] += share
        return sorted(scores, key=lambda task: -scores[task])

    def agrees(self, triplet: Triplet) -> bool:
        """Whether ``triplet.task`` is among the likeliest types."""
        return triplet.task in self.ranked(triplet)[:GOOD_PLACES]


@functools.cache
def seed_reader() -> TaskReader:
    """The reader that has learnt from the shipped seeds."""
    from ip2p.triplets.seed import load_seeds

    return TaskReader(load_seeds())


def _features(triplet: Triplet) -> Iterator[str]:
    texts = (triplet.caption, triplet.instruction, triplet.edited_caption)
    caption, words, edited = (normalised(text).split() for text in texts)
    yield from (f"says {word}" for word in words)
    yield from (f"says {first} {second}" for first, second in itertools.pairwise(words))
    yield f"begins {words[0] if words else ''}"
    asked, before, after = stems(triplet.instruction), stems(triplet.caption), stems(triplet.edited_caption)
    new, gone = after - before, before - after
    yield from (f"new {stem}" for stem in new)
    yield from (f"gone {stem}" for stem in gone)
    yield f"{min(3, len(new))} new"
    yield f"{min(3, len(gone))} gone"
    yield f"{max(-3, min(3, len(edited) - len(caption)))} longer"
    yield f"{min(3, len(asked & new))} new that were asked for"
    yield f"{min(2, len(asked & gone))} gone that were named"
    yield f"{min(2, len(asked & before & after))} named that stay"
    if '"' in triplet.instruction:
        yield "quotes"
    if any(character.isdigit() for character in triplet.instruction):
        yield "figures"
    if caption[:1] != edited[:1]:
        yield "other beginning"
    if caption[-1:] != edited[-1:]:
        yield "other end"
    if set(caption) == set(edited):
        yield "the same words"
