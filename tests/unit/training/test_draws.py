from __future__ import annotations

import numpy as np
import pytest
import torch

from ip2p.training.draws import draw

SHAPE = (4, 8, 8)


def test_draws_do_not_depend_on_how_a_batch_is_shared() -> None:
    whole = draw(1, 5, range(8), SHAPE, 0.5)
    shares = [draw(1, 5, places, SHAPE, 0.5) for places in np.array_split(np.arange(8), 3)]
    for name, tensor in vars(whole).items():
        assert torch.equal(torch.cat([vars(share)[name] for share in shares]), tensor), name


@pytest.mark.parametrize("other", [(2, 5, 0), (1, 6, 0), (1, 5, 1)])
def test_seed_step_and_place_each_change_every_draw(other: tuple[int, int, int]) -> None:
    seed, step, place = other
    one, two = draw(1, 5, range(64), SHAPE, 0.5), draw(seed, step, range(place, place + 64), SHAPE, 0.5)
    for name, tensor in vars(one).items():
        assert not torch.equal(vars(two)[name], tensor), name


def test_the_two_noises_of_a_sample_are_strangers_and_normal() -> None:
    draws = draw(0, 0, range(200), SHAPE, 0.5)
    both = torch.stack([draws.noise.flatten(), draws.posterior_noise.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02
    assert both.mean(dim=1).abs().max() < 0.02
    assert (both.std(dim=1) - 1).abs().max() < 0.02


def test_timesteps_fill_0_to_999_and_flips_keep_their_chance() -> None:
    draws = draw(0, 0, range(20_000), (1, 1, 1), 0.25)
    assert draws.timesteps.unique().numel() == 1000
    assert (int(draws.timesteps.min()), int(draws.timesteps.max())) == (0, 999)
    assert float(draws.flips.double().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_a_flip_is_never_or_always_where_its_chance_says_so(flip: float, share: float) -> None:
    assert float(draw(0, 0, range(200), (1, 1, 1), flip).flips.double().mean()) == share
