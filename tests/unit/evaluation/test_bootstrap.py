"""How sure a mean is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ip2p.evaluation.bootstrap import bootstrap_mean


def test_band_is_about_two_standard_errors_wide_on_both_sides():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    band = bootstrap_mean(values.tolist())
    error = values.std() / math.sqrt(400)
    assert band.mean == pytest.approx(values.mean())
    assert band.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert band.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_less_confidence_is_a_narrower_band():
    values = list(range(50))
    wide, narrow = bootstrap_mean(values, confidence=0.95), bootstrap_mean(values, confidence=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_same_values_give_the_same_band_and_shifted_values_a_shifted_one():
    values = np.random.default_rng(1).random(30)
    band, shifted = bootstrap_mean(values.tolist()), bootstrap_mean((values + 1).tolist())
    assert band == bootstrap_mean(values.tolist())
    assert np.allclose(np.array(shifted) - 1, band)


def test_no_samples_are_no_number():
    assert all(math.isnan(value) for value in bootstrap_mean([]))
