"""The noise levels of the released code: the model's own table, interpolated at evenly spaced timesteps.

The paper cites Karras et al., whose spacing the released code does not use. Levels are those of k-diffusion's
``sigma``: a noisy latent is ``x_0 + sigma * noise``. Nothing here is random or sampled.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping

import torch

from ip2p.errors import CheckpointError


def training_sigmas(scheduler_config: Mapping[str, typing.Any]) -> torch.Tensor:
    """sigma at each training timestep, rising, ``(num_train_timesteps,)`` float64.

    Raises CheckpointError for a schedule of betas that diffusers knows and this file does not.
    """
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
        **{name: value for name, value in scheduler_config.items() if value is not None},
    }  # fmt: skip
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config.get("rescale_betas_zero_snr") or "trained_betas" in config:
        raise CheckpointError("scheduler_config.json: zero-SNR or trained betas are not supported; use another model")
    if config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        found = config["beta_schedule"]
        raise CheckpointError(f"scheduler_config.json: found beta_schedule {found!r}, expected scaled_linear or linear")
    signal = torch.cumprod(1 - betas, dim=0)
    return ((1 - signal) / signal).sqrt()


def sample_timesteps(scheduler_config: Mapping[str, typing.Any], steps: int) -> torch.Tensor:
    """Evenly spaced, fractional timesteps from the last to 0, ``(steps,)`` float64."""
    count = len(training_sigmas(scheduler_config))
    return torch.linspace(count - 1, 0, steps, dtype=torch.float64)


def sigma_table(scheduler_config: Mapping[str, typing.Any], steps: int) -> torch.Tensor:
    """The falling sigmas of a run and a last 0, ``(steps + 1,)`` float64."""
    sigmas = sigma_of(sample_timesteps(scheduler_config, steps), scheduler_config)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sigma_of(timesteps: torch.Tensor, scheduler_config: Mapping[str, typing.Any]) -> torch.Tensor:
    """sigma at fractional ``timesteps`` (n,), by linear interpolation of log sigma."""
    logs = training_sigmas(scheduler_config).log()
    low = timesteps.floor().long().clamp(0, len(logs) - 2)
    return torch.lerp(logs[low], logs[low + 1], timesteps.double() - low).exp()
