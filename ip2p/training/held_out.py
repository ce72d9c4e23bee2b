"""Loss on pairs that are never trained on, by band of timesteps, with nothing dropped and nothing mirrored.

Every pair meets every band, at a timestep and with noises that belong to the pair: two looks at one model are equal,
and looks at two models differ by the models alone. The original's own validation loss has dropout in it.
"""

from __future__ import annotations

import numpy as np
import torch

from ip2p.errors import DatasetError
from ip2p.seeds import derive_seed
from ip2p.training.draws import TIMESTEPS, draw
from ip2p.training.loss import Forward, NoiseSchedule, autocast, image_latents, sample_losses, target_latents
from ip2p.training.pair_columns import PairColumns, PairSource

BANDS = 10
"""Bands of 100 timesteps; band 0 has the least noise."""
SEED = derive_seed("held out")


def band_of(timesteps: np.ndarray) -> np.ndarray:
    """The band of each timestep 0..999."""
    return timesteps * BANDS // TIMESTEPS


@torch.no_grad()
def held_out_losses(
    forward: Forward,
    source: PairSource,
    schedule: NoiseSchedule,
    limit: int | None = None,
    batch: int = 32,
    precision: str = "float32",
) -> np.ndarray:
    """The loss of each of the first ``limit`` pairs in each band, ``(pairs, BANDS)``.

    ``precision`` as in TrainingRecipe. Raises DatasetError for an empty source.
    """
    count = min(len(source), limit or len(source))
    if not count:
        raise DatasetError("there are no held-out pairs; the split column of the run folders has no 'val'")
    looks = []
    for first in range(0, count, batch):
        indices = np.arange(first, min(first + batch, count))
        columns = source.rows(indices, np.zeros(len(indices), bool))
        bands = [_band_losses(forward, columns, indices, band, schedule, precision) for band in range(BANDS)]
        looks.append(torch.stack(bands, dim=1).cpu().numpy())
    return np.concatenate(looks)


def _band_losses(
    forward: Forward, columns: PairColumns, indices: np.ndarray, band: int, schedule: NoiseSchedule, precision: str
) -> torch.Tensor:
    device, latent_shape = columns.edited_mean.device, tuple(columns.edited_mean.shape[1:])
    draws = draw(SEED, band, indices, latent_shape, flip=0.0).to(device)
    timesteps = band * (TIMESTEPS // BANDS) + draws.timesteps // BANDS
    clean, image = target_latents(columns, draws.posterior_noise, schedule), image_latents(columns, schedule)
    with autocast(precision, device):
        return sample_losses(forward, clean, image, columns.text_states, draws.noise, timesteps, schedule)
