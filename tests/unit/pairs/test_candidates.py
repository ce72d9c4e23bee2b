from __future__ import annotations

import math

import pytest

from ip2p.config import load_recipe
from ip2p.pairs import candidates as module
from ip2p.pairs.candidates import draw_candidates
from ip2p.seeds import derive_seed


def recipe(*overrides: str):
    return load_recipe("sd15", overrides)


def test_draws_belong_to_run_seed_and_prompt() -> None:
    first = draw_candidates(recipe(), "a")
    assert first == draw_candidates(recipe(), "a")
    assert not {one.seed for one in first} & {one.seed for one in draw_candidates(recipe(), "b")}
    assert not {one.seed for one in first} & {one.seed for one in draw_candidates(recipe("seed=1"), "a")}
    assert first[3].seed == derive_seed(0, "a", 3) % 2**32


def test_more_candidates_add_some_and_change_none() -> None:
    assert draw_candidates(recipe("pairs.candidates=7"), "a") == draw_candidates(recipe(), "a")[:7]


def test_draws_are_uniform_over_the_recipes_ranges() -> None:
    drawn = draw_candidates(recipe("pairs.candidates=2000"), "a")
    thresholds, scales = ([getattr(one, name) for one in drawn] for name in ("p2p_threshold", "guidance_scale"))
    assert 0.1 <= min(thresholds) < 0.11
    assert 0.89 < max(thresholds) < 0.9
    assert 7.5 <= min(scales) < 7.6
    assert 14.9 < max(scales) < 15.0
    assert sum(thresholds) / 2000 == pytest.approx(0.5, abs=0.02)
    assert sum(scales) / 2000 == pytest.approx(11.25, abs=0.2)
    mixed = sum((t - 0.5) * (s - 11.25) for t, s in zip(thresholds, scales, strict=True)) / 2000
    assert abs(mixed) < 0.05  # the two draws do not depend on each other


def test_equal_ends_give_that_value() -> None:
    drawn = draw_candidates(recipe("pairs.p2p_min=0.5", "pairs.p2p_max=0.5"), "a")
    assert {one.p2p_threshold for one in drawn} == {0.5}


def test_candidates_are_unscored_and_their_seeds_fit_32_bits() -> None:
    drawn = draw_candidates(recipe(), "a")
    assert len(drawn) == 100
    assert max(one.seed for one in drawn) < 2**32
    assert all(math.isnan(one.sim_direction) and one.reason == "" for one in drawn)


def test_seeds_of_a_prompt_never_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "derive_seed", lambda *identity: 2**32 - 1)
    assert [one.seed for one in draw_candidates(recipe("pairs.candidates=3"), "a")] == [2**32 - 1, 0, 1]
