"""Which triplets are accepted, and the reason when one is not (paper, section 3.1, with three rules more).

The original wants a completion that parses, an edited caption that differs, and no moderation flag. Added here: no
blank text, nothing longer than the text encoder reads, and no near duplicate within a unit of work. This file loads no
model; counting tokens and moderation are functions that the caller passes in.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from ip2p.schema import Triplet
from ip2p.triplets.format import parse_completion

Window = Callable[[str], int]
"""Counts a text's tokens as the text encoder sees them, BOS and EOS included."""
Moderation = Callable[[Sequence[str]], bool]
"""True when any of the texts must not be used."""

NEAR_DUPLICATE_JACCARD = 0.9


def judge(
    caption: str, completion: str, window: Window | None, limit: int, flagged: Moderation | None = None
) -> tuple[Triplet | None, str]:
    """Parse what a writer wrote for ``caption`` and judge it: ``(triplet, "ok")`` or ``(None, reason)``.

    ``limit`` is in tokens (77 for CLIP); ``window`` None leaves lengths unchecked. Reasons are those of
    ``schema.TRIPLET_REASONS``: unparseable, empty, unchanged, too_long, flagged, in this order.
    """
    parts = parse_completion(completion)
    if parts is None or not is_encodable(completion):
        return None, "unparseable"
    triplet = Triplet(caption, *parts)
    reason = judge_triplet(triplet, window, limit, flagged)
    return (triplet if reason == "ok" else None), reason


def judge_triplet(triplet: Triplet, window: Window | None, limit: int, flagged: Moderation | None = None) -> str:
    """``ok``, or why a triplet that is already split into its texts cannot be used."""
    texts = (triplet.caption, triplet.instruction, triplet.edited_caption)
    if any(is_blank(text) for text in texts):
        return "empty"
    if _comparable(triplet.caption) == _comparable(triplet.edited_caption):
        return "unchanged"
    return _unusable(texts, window, limit, flagged) or "ok"


def judge_caption(caption: str, window: Window | None, limit: int, flagged: Moderation | None = None) -> str:
    """``ok``, or why no writer needs to be asked: bad_caption (blank), too_long or flagged."""
    if is_blank(caption):
        return "bad_caption"
    return _unusable((caption,), window, limit, flagged) or "ok"


def is_blank(text: str) -> bool:
    """Whether nothing in ``text`` would be visible (spaces, control and zero-width characters)."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def is_encodable(text: str) -> bool:
    """Whether ``text`` can be stored as UTF-8; half of a surrogate pair, which JSON can carry, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalised(text: str) -> str:
    """``text`` in lower case without punctuation and with single spaces; the text itself if it is all punctuation.

    Symbols and combining marks stay: a caption may be an emoji, and in many scripts vowels are marks.
    """
    words = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION).split()
    return " ".join(words) or text.strip()


class NearDuplicates:
    """Remembers the accepted triplets of one unit of work and finds those that nearly repeat an earlier one.

    A nearly repeats B when both have the same normalised instruction and the words of their captions and
    instructions overlap by a Jaccard index of at least 0.9. The instruction must be the same because in a long caption
    one word hardly moves the index, while "make it red" and "make it blue" are two edits.

    Looking further than one unit of work would make the answer depend on which worker came first. Within it rows always
    travel together, so offering them in the order of their index gives the same answer on every run: the lowest index
    wins. Equal captions in different units never get here; reading the captions leaves them out.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[frozenset[str]]] = {}

    def add(self, caption: str, instruction: str) -> bool:
        """Remember this triplet and return True, or return False if it nearly repeats one already here."""
        instruction = normalised(instruction)
        words = frozenset(normalised(caption).split()) | frozenset(instruction.split())
        earlier = self._seen.setdefault(instruction, [])
        if any(_jaccard(words, others) >= NEAR_DUPLICATE_JACCARD for others in earlier):
            return False
        earlier.append(words)
        return True


class _PunctuationTable(dict[int, str]):
    """A ``str.translate`` table that learns each character the first time it is met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character).startswith("P") else character
        return self[code]


_PUNCTUATION = _PunctuationTable()


def _comparable(text: str) -> str:
    return text.strip().strip(".!?").lower()  # as the original compares captions


def _unusable(texts: Sequence[str], window: Window | None, limit: int, flagged: Moderation | None) -> str:
    if window is not None and any(window(text) > limit for text in texts):
        return "too_long"
    if flagged is not None and flagged(texts):
        return "flagged"
    return ""


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0
