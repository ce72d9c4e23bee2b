"""How sure a mean is: percentile bootstrap over samples (Efron 1979). numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """A mean and the ends of its confidence interval; all three NaN without samples."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Band:
    """The mean of n values and the interval that ``confidence`` of the resampled means lie in.

    The same seed draws the same places for any values, so that points of one curve, measured on the same samples in
    the same order, move together.
    """
    array = np.asarray(values, np.float64)
    if not len(array):
        return Band(np.nan, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    # One resample at a time: all at once would take n * resamples numbers.
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Band(float(array.mean()), float(low), float(high))
