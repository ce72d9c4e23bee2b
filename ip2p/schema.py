"""The records that move through the project, and nothing else: names follow docs/names.md, units are in the names.

Producers and consumers import their column names from here, so that nothing has two names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SCHEMA_VERSION = 1

# Why a caption gave no triplet, or a candidate no pair. ``kept`` and ``ok`` are reasons too: each row has one.
TRIPLET_REASONS = (
    "ok",  # accepted
    "unparseable",  # the completion does not split into instruction and edited caption
    "empty",  # instruction or edited caption is blank
    "unchanged",  # edited caption equals the caption (case and final punctuation aside)
    "too_long",  # a text does not fit the text encoder's window
    "near_duplicate",  # the same edit of nearly the same caption was accepted before
    "flagged",  # refused by the moderation check
    "writer_failed",  # the writer gave nothing after all its tries
    "bad_caption",  # the input caption itself cannot be used
    "inconsistent",  # the edited caption does not show what the instruction asks for, or is another altogether
    "wrong_task",  # an edit of another type than was asked for
    "over_quota",  # accepted, but its type has come too often
    "over_budget",  # not asked: it could have cost more than is left
)
CANDIDATE_REASONS = (
    "kept",
    "below_image", "below_direction", "below_original", "below_edited",  # the first threshold that failed
    "over_max_kept",  # passed, but better ones filled the prompt's places
    "not_finite",  # the sampler gave NaN or Inf
)  # fmt: skip


@dataclass(frozen=True)
class Triplet:
    """What a language model wrote for a caption: the instruction and the caption it leads to."""

    caption: str
    instruction: str
    edited_caption: str
    task: str = ""
    url: str = ""


@dataclass(frozen=True)
class Candidate:
    """One painted pair before filtering: how it was drawn and how CLIP scored it."""

    seed: int
    p2p_threshold: float
    guidance_scale: float
    sim_original: float = float("nan")
    sim_edited: float = float("nan")
    sim_image: float = float("nan")
    sim_direction: float = float("nan")
    reason: str = ""


@dataclass(frozen=True)
class LedgerRow:
    """All that is known of one prompt after it was worked on; written once, never amended."""

    prompt_id: str
    index: int
    status: str
    reason: str
    triplet: Triplet
    candidates: tuple[Candidate, ...] = field(default=())
    row_evals: int = 0
    error: str = ""
