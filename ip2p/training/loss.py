"""The training objective: find the noise (or v) in a noisy edited latent, given the original image and the instruction.

Equation 1 of the paper. Target latents are posterior samples times the VAE's scaling factor; image latents are
posterior modes, not scaled, as in the original (``image_latent_scaled`` is for models of the other convention). Losses
come out a sample, so that they can be looked at by timestep. Nothing is drawn or read here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ip2p.pairs.sigmas import training_sigmas
from ip2p.training.pair_columns import PairColumns

Forward = Callable[..., typing.Any]
"""A UNet2DConditionModel, or a wrapper of one."""


@dataclass(frozen=True)
class NoiseSchedule:
    """What the scheduler's and the VAE's configs say about noise and scale."""

    alphas: torch.Tensor  # (1000,) float32: the signal's share of the power at each timestep
    prediction_type: str  # epsilon | v_prediction
    scaling_factor: float
    shift_factor: float = 0.0
    image_latent_scaled: bool = False

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(**{**vars(self), "alphas": self.alphas.to(device)})


def noise_schedule(
    scheduler_config: Mapping[str, typing.Any], vae_config: typing.Any, image_latent_scaled: bool = False
) -> NoiseSchedule:
    """Read off the configs of a loaded model; raises CheckpointError for a schedule of betas that is not known."""
    sigmas = training_sigmas(scheduler_config)
    return NoiseSchedule(
        alphas=(1.0 / (1.0 + sigmas**2)).float(),
        prediction_type=scheduler_config.get("prediction_type", "epsilon"),
        scaling_factor=vae_config.scaling_factor,
        shift_factor=getattr(vae_config, "shift_factor", None) or 0.0,
        image_latent_scaled=image_latent_scaled,
    )


def target_latents(columns: PairColumns, posterior_noise: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    """A sample of each edited image's posterior, shifted and scaled as the UNet expects, ``(n, C, h, w)``."""
    sample = columns.edited_mean + columns.edited_std * posterior_noise
    return (sample - schedule.shift_factor) * schedule.scaling_factor


def image_latents(columns: PairColumns, schedule: NoiseSchedule) -> torch.Tensor:
    """The original images as the UNet sees them beside the noisy latent, ``(n, C, h, w)``."""
    if schedule.image_latent_scaled:
        return columns.original_mode * schedule.scaling_factor
    return columns.original_mode


def sample_losses(
    forward: Forward,
    clean: torch.Tensor,
    image: torch.Tensor,
    text_states: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseSchedule,
) -> torch.Tensor:
    """Mean squared error of each sample, ``(n,)`` float32.

    ``clean``, ``image``, ``noise`` ``(n, C, h, w)``; ``text_states`` ``(n, T, D)``; ``timesteps`` ``(n,)`` 0..999.
    """
    alphas = schedule.alphas[timesteps][:, None, None, None]
    signal, rest = alphas.sqrt(), (1.0 - alphas).sqrt()
    noisy = signal * clean + rest * noise
    seen = torch.cat([noisy, image], dim=1).contiguous(memory_format=memory_format(clean.device))
    answer = forward(seen, timesteps, text_states).sample
    wanted = noise if schedule.prediction_type == "epsilon" else signal * noise - rest * clean
    return (answer.float() - wanted).square().mean(dim=(1, 2, 3))


def memory_format(device: torch.device) -> torch.memory_format:
    """How pictures and their filters lie in memory: what convolutions are fastest with on ``device``.

    On two CPU cores the embedded UNet trains 59 samples a second with contiguous memory and 51 with channels last.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on float32 weights where ``precision`` says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
