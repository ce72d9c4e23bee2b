"""All that chance decides about a sample, from a generator of its own: (run seed, step, place in the global batch).

So the numbers are the same however many workers share the batch, and after any resume. What is done with them is
elsewhere (conditioning_dropout.py, loss.py, the sources of pairs).
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

import numpy as np
import torch

from ip2p.seeds import derive_seed

TIMESTEPS = 1000


@dataclass(frozen=True)
class Draws:
    """Draws of ``n`` samples."""

    dropout: torch.Tensor  # (n,) float64, uniform in [0, 1)
    flips: torch.Tensor  # (n,) bool
    timesteps: torch.Tensor  # (n,) int64, uniform in 0..999
    noise: torch.Tensor  # (n, C, h, w) float32, normal: what the UNet is to find
    posterior_noise: torch.Tensor  # (n, C, h, w) float32, normal: where in the VAE's posterior the target lies

    def to(self, device: torch.device) -> Draws:
        return Draws(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def draw(
    seed: int, step: int, places: typing.Sequence[int] | np.ndarray, latent_shape: tuple[int, ...], flip: float
) -> Draws:
    """The draws of the samples at ``places`` of global batch ``step``, on the CPU; ``flip`` is the chance of a flip."""
    count = len(places)
    uniforms = np.empty((count, 3))
    noises = np.empty((count, 2, *latent_shape), np.float32)
    for row, place in enumerate(places):
        generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "sample", step, place)))
        generator.random(out=uniforms[row])
        generator.standard_normal(dtype=np.float32, out=noises[row])
    both = torch.from_numpy(noises)
    return Draws(
        dropout=torch.from_numpy(uniforms[:, 0]),
        flips=torch.from_numpy(uniforms[:, 1] < flip),
        timesteps=torch.from_numpy((uniforms[:, 2] * TIMESTEPS).astype(np.int64)),
        noise=both[:, 0],
        posterior_noise=both[:, 1],
    )
