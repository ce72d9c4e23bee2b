"""The 8x autoencoder: 64×64 pixels to 8×8×4 latents and back (diffusers AutoencoderKL, as in Stable Diffusion)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ip2p.postcards.family.drawings import Drawings
from ip2p.postcards.family.fitting import Schedule, fit

if TYPE_CHECKING:
    # diffusers hides the methods of torch modules from type checkers
    from typing import Any as AutoencoderKL

KL_WEIGHT = 3e-4  # per latent number; enough that neighbouring latents decode alike, little enough that edges stay
LATENT_NOISE = 0.15  # a tenth of the latents' deviation: what a UNet gets a little wrong must decode alike as well
HOLD_WEIGHT = 0.03  # on squared distances to latents held


def new_autoencoder() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_unit(pixels: np.ndarray) -> torch.Tensor:
    """uint8 ``(n, H, W, 3)`` to float ``(n, 3, H, W)`` in [-1, 1], channels last."""
    picture = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float()
    return (picture / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squares on pixels and on 4x means (colours), L1 on pixels and on their differences (edges).

    The squares are what makes small coloured things appear early: to L1 a yellow tent on sand is a rounding error.
    """
    squares = F.mse_loss(made, wanted) + 2 * F.mse_loss(F.avg_pool2d(made, 4), F.avg_pool2d(wanted, 4))
    edges = sum((made.diff(dim=d) - wanted.diff(dim=d)).abs().mean() for d in (2, 3))
    return 2 * squares + 0.5 * F.l1_loss(made, wanted) + 0.25 * edges


def train_autoencoder(
    folder: Path, drawings: Drawings, schedule: Schedule, device: str = "cpu", hold: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train from ``drawings``. Latents stay near those of ``hold``, so that a UNet of its latents goes on with little.

    That is for a small change of the world: what it newly shows is learned, and what was is encoded as before.
    """
    torch.manual_seed(0)
    vae = new_autoencoder().to(memory_format=torch.channels_last).to(device)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((1, step))
        chosen = np.sort(rng.integers(len(drawings.pixels), size=schedule.batch))
        wanted = to_unit(drawings.pixels[chosen]).to(device)
        noise = torch.from_numpy(rng.standard_normal((schedule.batch, 4, 8, 8), dtype=np.float32)).to(device)
        posterior = vae.encode(wanted).latent_dist
        made = vae.decode(posterior.mean + (posterior.std.square() + LATENT_NOISE**2).sqrt() * noise).sample
        loss = reconstruction_loss(made, wanted) + KL_WEIGHT * posterior.kl().mean() / 256
        if hold is not None:
            with torch.no_grad():
                held = hold.encode(wanted).latent_dist.mean
            loss = loss + HOLD_WEIGHT * F.mse_loss(posterior.mean, held)
        return loss

    return fit("vae", folder, vae, loss_of, schedule)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, drawings: Drawings, batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior means and standard deviations of all drawings, each ``(n, 4, 8, 8)``, unscaled."""
    vae.eval()
    means, stds = [], []
    for start in range(0, len(drawings.pixels), batch):
        posterior = vae.encode(to_unit(drawings.pixels[start : start + batch]).to(vae.device)).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return torch.cat(means), torch.cat(stds)
