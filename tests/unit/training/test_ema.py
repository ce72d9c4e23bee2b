from __future__ import annotations

import pytest
import torch

from ip2p.training.ema import Ema, decay_at


def test_decay_is_ramped_up_as_in_the_original() -> None:
    assert [decay_at(n, 0.9999) for n in (1, 2, 90)] == pytest.approx([2 / 11, 3 / 12, 91 / 100])
    assert decay_at(10**6, 0.9999) == 0.9999
    assert decay_at(10**6, 0.0) == 0.0


def test_the_average_moves_towards_the_weights_by_one_minus_decay() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    ema = Ema(weights, decay=0.9)
    moved = {"a": torch.ones(3), "b": torch.full((2,), 3.0)}
    ema.update(moved, updates=10_000)
    assert ema.averages["a"].tolist() == pytest.approx([0.1] * 3)
    assert ema.averages["b"].tolist() == pytest.approx([1.2] * 2)
    assert weights["a"].tolist() == [0.0] * 3


def test_half_precision_weights_have_a_float32_average() -> None:
    ema = Ema({"a": torch.ones(1, dtype=torch.bfloat16)}, decay=0.9999)
    ema.update({"a": torch.full((1,), 2.0, dtype=torch.bfloat16)}, updates=10**6)
    assert ema.averages["a"].item() == pytest.approx(1.0001)


def test_the_average_takes_the_weights_place_and_gives_it_back() -> None:
    weights = {"a": torch.nn.Parameter(torch.zeros(3))}
    ema = Ema(weights, decay=0.5)
    with torch.no_grad():
        weights["a"].fill_(4.0)

    def look() -> None:
        with ema.in_place_of(weights):
            assert weights["a"].tolist() == [0.0] * 3
            raise RuntimeError("a look that fails")

    with pytest.raises(RuntimeError, match="a look that fails"):
        look()
    assert weights["a"].tolist() == [4.0] * 3
    assert ema.averages["a"].tolist() == [0.0] * 3
