"""Which pairs make up the global batch of a step: a function of (seed, step), so that resuming needs only the step.

Each epoch is one shuffle of all pairs. The pairs come in blocks of neighbours; blocks are shuffled, and then the pairs
within windows of some blocks, so that a reader touches a few files at a time however large the dataset is. Up to
``BLOCK * WINDOW`` pairs the shuffle is a uniform one. Nothing is read here.
"""

from __future__ import annotations

import functools

import numpy as np

from ip2p.errors import DatasetError, InputError
from ip2p.seeds import derive_seed

BLOCK = 512
"""Pairs of neighbouring index that stay in one window: about a part of the latent cache."""
WINDOW = 8
"""Blocks that are shuffled together: 4096 pairs, some hundred MB of latents at 256 pixels."""


class Order:
    """The endless sequence of epochs over ``pairs`` pairs, cut into global batches.

    An epoch's last, incomplete batch is filled up from the next epoch: every pair is seen once an epoch, also where
    the dataset is smaller than a batch. Raises DatasetError for no pairs.
    """

    def __init__(self, pairs: int, global_batch: int, seed: int, block: int = BLOCK, window: int = WINDOW):
        if pairs < 1:
            raise DatasetError("there are no pairs to train on; check the run folders and their split column")
        self.pairs, self.global_batch, self.seed = pairs, global_batch, seed
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: shuffled(pairs, derive_seed(seed, "epoch", epoch), block, window)
        )

    def batch(self, step: int) -> np.ndarray:
        """Indices of the pairs of global batch ``step``, ``(global_batch,)`` int64."""
        start, end = step * self.global_batch, (step + 1) * self.global_batch
        epochs = range(start // self.pairs, (end - 1) // self.pairs + 1)
        whole = np.concatenate([self._epoch(epoch) for epoch in epochs])
        first = epochs[0] * self.pairs
        return whole[start - first : end - first]

    def rows_of(self, step: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """``(places, indices)``: worker ``rank``'s places in global batch ``step``, and the pairs there."""
        places = places_of(self.global_batch, rank, world)
        return places, self.batch(step)[places]


def places_of(global_batch: int, rank: int, world: int) -> np.ndarray:
    """Worker ``rank``'s places, consecutive; shares differ by at most one. InputError for too many workers."""
    if world > global_batch:
        raise InputError(f"{world} workers share a global batch of {global_batch}; use fewer workers or a larger batch")
    return np.array_split(np.arange(global_batch), world)[rank]


def shuffled(pairs: int, seed: int, block: int, window: int) -> np.ndarray:
    """``0..pairs-1`` in an order that mixes ``window`` blocks of ``block`` neighbours at a time, ``(pairs,)`` int64."""
    random = np.random.default_rng(seed)
    blocks = random.permutation(-(-pairs // block))
    parts = []
    for first in range(0, len(blocks), window):
        starts = blocks[first : first + window, None] * block + np.arange(block)
        members = starts.ravel()
        parts.append(random.permutation(members[members < pairs]))
    return np.concatenate(parts)
