from __future__ import annotations

import numpy as np
import pytest
import torch

from ip2p.errors import CheckpointError
from ip2p.pairs.sigmas import sample_timesteps, sigma_table, training_sigmas

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_table_has_the_released_models_ends() -> None:
    sigmas = sigma_table(SD, 100)
    assert sigmas.shape == (101,)
    assert sigmas[0].item() == pytest.approx(14.614642, abs=1e-5)
    assert sigmas[-2].item() == pytest.approx(0.029168, abs=1e-6)
    assert sigmas[-1].item() == 0
    assert (sigmas[:-1] > sigmas[1:]).all()


def test_table_is_log_linear_between_the_training_levels() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    logs = np.log(np.sqrt((1 - signal) / signal))
    expected = np.exp(np.interp(np.linspace(999, 0, 7), np.arange(1000), logs))
    assert sigma_table(SD, 7)[:-1].numpy() == pytest.approx(expected, rel=1e-12)
    assert sample_timesteps(SD, 7).tolist() == pytest.approx([999, 832.5, 666, 499.5, 333, 166.5, 0])


def test_stable_diffusions_schedule_is_the_default_for_fields_that_are_absent_or_null() -> None:
    assert torch.equal(sigma_table({}, 9), sigma_table(SD, 9))
    assert torch.equal(sigma_table({**SD, "trained_betas": None, "beta_schedule": None}, 9), sigma_table(SD, 9))


def test_linear_betas_give_another_table() -> None:
    config = {**SD, "beta_schedule": "linear"}
    betas = np.linspace(0.00085, 0.012, 1000)
    signal = np.cumprod(1 - betas)
    assert training_sigmas(config)[[0, 999]].numpy() == pytest.approx(np.sqrt((1 - signal) / signal)[[0, 999]])


@pytest.mark.parametrize(
    "extra", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.1]}]
)
def test_schedule_that_is_not_supported_is_refused(extra: dict) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        sigma_table({**SD, **extra}, 10)
