"""Which candidates are kept: four CLIP thresholds, then the best few (InstructPix2Pix, section 3.1.2).

Pure functions of the scores, so that other thresholds can be tried on stored scores without painting again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ip2p.config import Filter
from ip2p.schema import Candidate


def judge(candidates: Sequence[Candidate], thresholds: Filter) -> list[Candidate]:
    """The same candidates in the same order, each with its reason.

    All four similarities must reach (``>=``) their thresholds; of those that do, the ``max_kept`` with the highest
    ``sim_direction`` are ``kept`` (at a tie the higher seed, as in the released code).
    """
    reasons = [failed_threshold(candidate, thresholds) for candidate in candidates]
    passed = [place for place, reason in enumerate(reasons) if not reason]
    passed.sort(key=lambda place: _rank_key(candidates[place]))
    for rank, place in enumerate(passed):
        reasons[place] = "kept" if rank < thresholds.max_kept else "over_max_kept"
    return [replace(candidate, reason=reason) for candidate, reason in zip(candidates, reasons, strict=True)]


def kept_places(judged: Sequence[Candidate]) -> list[int]:
    """Places of the kept candidates in ``judged``, best first."""
    kept = [place for place, candidate in enumerate(judged) if candidate.reason == "kept"]
    return sorted(kept, key=lambda place: _rank_key(judged[place]))


def failed_threshold(candidate: Candidate, thresholds: Filter) -> str:
    """The first threshold that a candidate misses, in the order image, direction, original, edited; "" if none."""
    sims = (candidate.sim_image, candidate.sim_direction, candidate.sim_original, candidate.sim_edited)
    if not all(math.isfinite(sim) for sim in sims):
        return "not_finite"
    minimums = (thresholds.min_image, thresholds.min_direction, thresholds.min_original, thresholds.min_edited)
    names = ("below_image", "below_direction", "below_original", "below_edited")
    for name, sim, minimum in zip(names, sims, minimums, strict=True):
        if not sim >= minimum:
            return name
    return ""


def _rank_key(candidate: Candidate) -> tuple[float, int]:
    return (-candidate.sim_direction, -candidate.seed)
