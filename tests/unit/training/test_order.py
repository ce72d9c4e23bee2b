from __future__ import annotations

import numpy as np
import pytest

from ip2p.errors import DatasetError, InputError
from ip2p.training.order import Order, places_of, shuffled


@pytest.mark.parametrize(("pairs", "batch"), [(10, 4), (3, 8), (8, 8), (1, 2), (700, 64)])
def test_every_pair_is_seen_once_an_epoch(pairs: int, batch: int) -> None:
    order = Order(pairs, batch, seed=0, block=8, window=3)
    steps = -(-3 * pairs // batch)
    seen = np.concatenate([order.batch(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * pairs : (epoch + 1) * pairs]) == list(range(pairs))


def test_a_step_s_batch_needs_no_step_before_it() -> None:
    order, fresh = Order(50, 8, seed=4), Order(50, 8, seed=4)
    walked = [order.batch(step) for step in range(20)]
    assert np.array_equal(fresh.batch(19), walked[19])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = Order(64, 64, seed=4)
    assert not np.array_equal(order.batch(0), order.batch(1))
    assert not np.array_equal(order.batch(0), Order(64, 64, seed=5).batch(0))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_workers_share_a_batch_without_overlap(world: int) -> None:
    order = Order(50, 8, seed=4)
    shares = [order.rows_of(3, rank, world) for rank in range(world)]
    assert np.concatenate([places for places, _ in shares]).tolist() == list(range(8))
    assert np.array_equal(np.concatenate([indices for _, indices in shares]), order.batch(3))
    sizes = [len(places) for places, _ in shares]
    assert max(sizes) - min(sizes) <= 1


def test_pairs_of_one_window_come_from_few_blocks() -> None:
    order = shuffled(1000, seed=1, block=10, window=4)
    assert sorted(order) == list(range(1000))
    for first in range(0, 1000, 40):
        assert len(set(order[first : first + 40] // 10)) == 4
    assert not np.array_equal(np.sort(order[:40]), order[:40])


def test_a_small_dataset_is_shuffled_uniformly() -> None:
    first = [shuffled(500, seed, 128, 32)[0] for seed in range(400)]
    counts = np.histogram(first, bins=5, range=(0, 500))[0]
    assert counts.min() > 50


def test_no_pairs_and_too_many_workers_are_refused() -> None:
    with pytest.raises(DatasetError, match="no pairs to train on"):
        Order(0, 8, seed=0)
    with pytest.raises(InputError, match="9 workers share a global batch of 8"):
        places_of(8, 0, 9)
