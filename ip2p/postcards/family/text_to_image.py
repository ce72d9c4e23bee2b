"""The family's text-to-image model: a diffusers UNet on 8×8×4 latents, conditioned on the CLIP text tower.

It predicts v (Salimans & Ho 2022) on Stable Diffusion's noise schedule: with so few latents most steps are nearly
pure noise, where predicting the noise itself teaches little. The scheduler file says so, and every sampler reads it.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ip2p.postcards.family.drawings import Drawings
from ip2p.postcards.family.fitting import Schedule, fit
from ip2p.postcards.family.tokenizer import WINDOW, copy_tokenizer
from ip2p.postcards.grammar import caption_of, sample_wording

if TYPE_CHECKING:
    # diffusers hides the methods of torch modules from type checkers
    from typing import Any as AutoencoderKL
    from typing import Any as UNet2DConditionModel

    from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "timestep_spacing": "linspace", "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}  # fmt: skip
TEXT_DROPOUT = 0.1


def new_unet(text_width: int = 128) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=text_width,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(112, 160), layers_per_block=1, norm_num_groups=16,
        attention_head_dim=(7, 10),  # number of heads, sixteen wide (the name is diffusers' own)
    )  # fmt: skip


@functools.cache
def alphas_cumprod() -> torch.Tensor:
    """Signal power left at each of the 1000 timesteps, ``(1000,)``."""
    ends = (math.sqrt(SCHEDULER["beta_start"]), math.sqrt(SCHEDULER["beta_end"]))  # type: ignore[arg-type]
    betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


def encode_captions(captions: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Last hidden states ``(n, 77, width)``, padding included, as Stable Diffusion conditions."""
    tokens = tokenizer(captions, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return text_encoder(tokens["input_ids"].to(text_encoder.device)).last_hidden_state


def train_text_to_image(
    folder: Path,
    drawings: Drawings,
    latents: tuple[torch.Tensor, torch.Tensor],
    scaling_factor: float,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    schedule: Schedule,
    device: str = "cpu",
    name: str = "unet",
) -> UNet2DConditionModel:
    """Train on posterior samples × ``scaling_factor``; ``latents`` are means and deviations of ``drawings``."""
    unet = new_unet(text_encoder.config.hidden_size).to(memory_format=torch.channels_last).to(device)
    means, stds = latents

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((4, step))
        chosen = rng.integers(len(means), size=schedule.batch)
        noises = torch.from_numpy(rng.standard_normal((2, schedule.batch, 4, 8, 8), dtype=np.float32))
        clean = (means[chosen] + stds[chosen] * noises[0]) * scaling_factor
        timesteps = torch.from_numpy(rng.integers(0, 1000, size=schedule.batch))
        captions = [
            "" if rng.random() < TEXT_DROPOUT else caption_of(drawings.scene(int(i)), sample_wording(rng))
            for i in chosen
        ]
        text = encode_captions(captions, tokenizer, text_encoder)
        return v_loss(unet, clean.to(device), noises[1].to(device), timesteps.to(device), text)

    return fit(name, folder, unet, loss_of, schedule)


def v_loss(
    unet: UNet2DConditionModel, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of v = √a · noise − √(1 − a) · clean at ``timesteps`` ``(n,)``; latents ``(n, 4, 8, 8)``."""
    a = alphas_cumprod().to(clean.device)[timesteps][:, None, None, None]
    noisy = a.sqrt() * clean + (1.0 - a).sqrt() * noise
    made = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, text).sample
    return F.mse_loss(made, a.sqrt() * noise - (1.0 - a).sqrt() * clean)


def scaling_factor_of(means: torch.Tensor) -> float:
    """What brings latents to unit deviation (Stable Diffusion's 0.18215 is the same thing for its own)."""
    return float(1.0 / means.float().std())


def save_text_to_image(
    folder: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer_folder: Path
) -> None:
    """A StableDiffusionPipeline folder in fp16 safetensors; ``vae.config.scaling_factor`` must be set."""
    for name, model in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        model.half().save_pretrained(folder / name, safe_serialization=True)
        model.float()
    copy_tokenizer(tokenizer_folder, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
