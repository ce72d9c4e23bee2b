"""Whether an edited caption says what its instruction asks for, and no more, judged by words.

It finds an edit that is named and not seen, a caption that was written anew, and things that nobody asked for. Meaning
it cannot judge; a judge that reads is in judge.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ip2p.schema import Triplet
from ip2p.triplets.acceptance import normalised
from ip2p.triplets.tasks import TASKS

MIN_KEPT = 0.25
"""Least share of a caption's words that its edit keeps."""
MAX_UNASKED = 2
"""Most words of an edited caption that stand neither in the caption nor in the instruction; stop words are free."""

# Types whose instruction names what will be seen. "Half as many" or "the other way round" names it by no word.
_NAMING = frozenset(TASKS) - {"count"}
_SAYING_LITTLE = """
    a all an and are as at be but by could d do for from give had has have he her here him his how i if in instead into
    is it its just let like ll make no not of off on one only or out over please put rather s she should so some
    than that the their them then there these they this to turn want was what where with without would
"""
_STOP_WORDS = frozenset(_SAYING_LITTLE.split())


def inconsistencies(triplet: Triplet) -> Iterator[tuple[str, str]]:
    """Kind (not_shown, rewritten, unasked) and a sentence for each thing that is wrong with an edit of its task."""
    caption, instruction, edited = map(stems, (triplet.caption, triplet.instruction, triplet.edited_caption))
    if triplet.task == "remove":
        if not instruction & (caption - edited):
            yield "not_shown", "nothing that the instruction names has left the caption"
    elif triplet.task in _NAMING and not instruction & (edited - caption):
        yield "not_shown", "no word of the instruction is new in the edited caption"
    quoted = re.findall(r'"([^"]+)"', triplet.instruction)
    if quoted and not any(words in triplet.edited_caption and words not in triplet.caption for words in quoted):
        yield "not_shown", f'"{quoted[-1]}" cannot be read in the edited caption'
    if len(caption & edited) < MIN_KEPT * len(caption):
        yield "rewritten", f"of {len(caption)} words of the caption {len(caption & edited)} are left"
    unasked = edited - caption - instruction
    if len(unasked) > MAX_UNASKED:
        yield "unasked", f"neither in the caption nor in the instruction: {', '.join(sorted(unasked))}"


def stems(text: str) -> frozenset[str]:
    """The words of ``text`` that say something, without their endings."""
    return frozenset(_stem(word) for word in normalised(text).split() if word not in _STOP_WORDS)


def _stem(word: str) -> str:
    """``word`` without the endings that inflection adds, so that "run" meets "running" and "snow" meets "snowy".

    Cruder than a real stemmer, which is enough: a wrong meeting costs one warning at most.
    """
    for endings in (("ing", "ed", "ies", "es", "s"), ("y", "e")):
        ending = next((end for end in endings if word.endswith(end) and len(word) - len(end) >= 3), "")
        word = word.removesuffix(ending)
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word
