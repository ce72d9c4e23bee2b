from __future__ import annotations

import math

import pytest

from ip2p.config import Filter
from ip2p.pairs.filtering import judge, kept_places
from ip2p.schema import CANDIDATE_REASONS, Candidate

EXACT = {"sim_image": 0.7, "sim_direction": 0.2, "sim_original": 0.21, "sim_edited": 0.22}
THRESHOLDS = Filter(min_image=0.7, min_direction=0.2, min_original=0.21, min_edited=0.22, max_kept=4)


def candidate(seed: int = 0, **sims: float) -> Candidate:
    return Candidate(seed=seed, p2p_threshold=0.5, guidance_scale=7.5, **{**EXACT, **sims})


def reasons(*candidates: Candidate, thresholds: Filter = THRESHOLDS) -> list[str]:
    return [judged.reason for judged in judge(candidates, thresholds)]


def test_scores_equal_to_all_four_thresholds_are_kept() -> None:
    assert reasons(candidate()) == ["kept"]


@pytest.mark.parametrize("name", ["image", "direction", "original", "edited"])
def test_the_next_number_below_a_threshold_is_refused_with_its_reason(name: str) -> None:
    below = math.nextafter(EXACT[f"sim_{name}"], 0)
    assert reasons(candidate(**{f"sim_{name}": below})) == [f"below_{name}"]


def test_reason_is_the_first_failure_in_the_order_image_direction_original_edited() -> None:
    names = ["image", "direction", "original", "edited"]
    for first in range(4):
        assert reasons(candidate(**{f"sim_{name}": -1.0 for name in names[first:]})) == [f"below_{names[first]}"]


@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_has_its_own_reason(name: str, value: float) -> None:
    assert reasons(candidate(**{name: value})) == ["not_finite"]


def test_best_by_direction_are_kept_and_the_order_of_candidates_stays() -> None:
    candidates = [candidate(seed, sim_direction=direction) for seed, direction in enumerate([0.3, 0.9, 0.1, 0.5, 0.7])]
    judged = judge(candidates, Filter(0.2, 0.2, 0.7, 0.2, max_kept=2))
    assert [one.reason for one in judged] == ["over_max_kept", "kept", "below_direction", "over_max_kept", "kept"]
    assert [one.seed for one in judged] == [0, 1, 2, 3, 4]
    assert kept_places(judged) == [1, 4]


def test_at_equal_direction_the_higher_seed_ranks_first() -> None:
    judged = judge([candidate(5), candidate(9), candidate(7)], Filter(0.2, 0.2, 0.7, 0.2, max_kept=2))
    assert [one.reason for one in judged] == ["over_max_kept", "kept", "kept"]
    assert kept_places(judged) == [1, 2]


def test_zero_thresholds_still_refuse_negative_similarities() -> None:
    everything = Filter(0, 0, 0, 0, 4)
    assert reasons(candidate(sim_direction=-0.01), thresholds=everything) == ["below_direction"]
    assert reasons(candidate(sim_direction=0.0), thresholds=everything) == ["kept"]


def test_judging_again_changes_nothing_and_every_reason_is_a_known_one() -> None:
    judged = judge([candidate(seed, sim_image=0.5 + seed / 10) for seed in range(9)], THRESHOLDS)
    assert judge(judged, THRESHOLDS) == judged
    assert {one.reason for one in judged} == {"below_image", "kept", "over_max_kept"} <= set(CANDIDATE_REASONS)


def test_no_candidates_are_no_candidates() -> None:
    assert judge([], THRESHOLDS) == []
    assert kept_places([]) == []
