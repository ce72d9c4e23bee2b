"""SDEdit (Meng et al. 2022), the paper's baseline: noise the picture part of the way, denoise it under a caption.

It needs a full caption of the wanted picture and trades faithfulness for change by one strength; the instruction is
not read. No edit model is involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ip2p.editing.denoiser import GuidedDenoiser
from ip2p.editing.guidance import needed_rows, row_states
from ip2p.errors import InputError
from ip2p.models.coding import latents_of, pictures_of, scaled, text_states
from ip2p.models.components import TextToImage
from ip2p.pairs.sampling import SAMPLERS, PairNoise
from ip2p.pairs.sigmas import sigma_table


@torch.inference_mode()
def sdedit(
    model: TextToImage,
    images: Sequence[np.ndarray],
    edited_captions: Sequence[str],
    *,
    seed: Sequence[int],
    strength: float = 0.75,
    steps: int = 50,
    guidance_scale: float = 7.5,
    sampler: str = "euler_ancestral",
) -> list[np.ndarray]:
    """Edit n pictures ``(H, W, 3)`` uint8 of one size, whose sides the model can take; returns n such.

    ``strength`` in [0, 1] is the share of ``steps`` that is run: 1 forgets the picture but for a trace, 0 gives it back
    as its autoencoder sees it. Raises InputError outside of that.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be between 0 and 1, got {strength}")
    clean = scaled(model.vae, latents_of(model.vae, images))
    channels, height, width = clean.shape[1:]
    noise = PairNoise(seed, (channels, height, width), model.unet.device)
    first = steps - round(strength * steps)
    if first == steps:
        return pictures_of(model.vae, clean)
    config = model.scheduler_config
    sigmas = sigma_table(config, steps)[first:].tolist()
    denoise = _denoiser(model, edited_captions, guidance_scale, steps, first)
    start = clean + noise()[:, 0] * sigmas[0]
    return pictures_of(model.vae, SAMPLERS[sampler](denoise, start, sigmas, lambda: noise()[:, 0]))


def _denoiser(
    model: TextToImage, captions: Sequence[str], guidance_scale: float, steps: int, first: int
) -> GuidedDenoiser:
    # With equal scales the guidance over image and text is the plain one over text: (1 - s) e(∅) + s e(T).
    scales = [guidance_scale] * len(captions)
    rows = needed_rows(scales, scales).to(model.unet.device)
    states = row_states(rows, text_states(model, captions), text_states(model, [""] * len(captions)))
    return GuidedDenoiser(model.unet, rows, states, None, model.scheduler_config, steps, first)
