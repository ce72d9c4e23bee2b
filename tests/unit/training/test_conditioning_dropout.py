from __future__ import annotations

import pytest
import torch

from ip2p.training.conditioning_dropout import drop_conditions, dropped
from ip2p.training.draws import draw


@pytest.mark.parametrize(
    ("uniform", "no_text", "no_image"),
    [
        (0.0, True, False), (0.0499, True, False), (0.05, True, True), (0.0999, True, True),
        (0.10, False, True), (0.1499, False, True), (0.1501, False, False), (0.999, False, False),
    ],
)  # fmt: skip
def test_one_uniform_decides_by_the_intervals_of_the_original(uniform: float, no_text: bool, no_image: bool) -> None:
    text, image = dropped(torch.tensor([uniform], dtype=torch.float64), rate=0.05)
    assert (bool(text), bool(image)) == (no_text, no_image)


def test_shares_over_100_000_draws_of_a_run_are_5_percent_each() -> None:
    uniforms = torch.cat([draw(3, step, range(1000), (1, 1, 1), 0.5).dropout for step in range(100)])
    no_text, no_image = dropped(uniforms, rate=0.05)
    shares = [float(kind.double().mean()) for kind in (no_text & ~no_image, no_text & no_image, no_image & ~no_text)]
    assert shares == pytest.approx([0.05, 0.05, 0.05], abs=0.002)


def test_dropped_texts_become_the_empty_one_and_dropped_images_zero() -> None:
    states, image, null = torch.ones(4, 3, 2), torch.full((4, 1, 2, 2), 5.0), torch.full((3, 2), 9.0)
    uniforms = torch.tensor([0.01, 0.06, 0.11, 0.5], dtype=torch.float64)
    texts, images = drop_conditions(states, image, null, uniforms, rate=0.05)
    assert texts[:, 0, 0].tolist() == [9.0, 9.0, 1.0, 1.0]
    assert images[:, 0, 0, 0].tolist() == [5.0, 0.0, 0.0, 5.0]


def test_rate_zero_drops_nothing() -> None:
    no_text, no_image = dropped(torch.linspace(0, 0.999, 500), rate=0.0)
    assert not no_text.any()
    assert not no_image.any()
