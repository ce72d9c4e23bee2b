"""Pictures to the VAE's posterior and texts to the text encoder's states: what a training step starts from.

Both models are frozen and float32. The posterior is kept as mean and deviation; that the target is a sample of it
times the scaling factor, and the condition its mode as it is, is decided in loss.py.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

import numpy as np
import torch

from ip2p.errors import RecipeError
from ip2p.images import decode_image, square
from ip2p.models.coding import pixels_per_latent
from ip2p.seeds import unit_uniform


@dataclass(frozen=True)
class PairEncoder:
    """The frozen parts of a Stable-Diffusion-class model that training needs, all on one device."""

    vae: typing.Any  # AutoencoderKL
    text_encoder: typing.Any  # CLIPTextModel
    tokenizer: typing.Any  # CLIPTokenizer

    @torch.no_grad()
    def posterior(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the VAE's posterior, each ``(n, C, h, w)``, for ``pixels`` ``(n, H, W, 3)`` uint8."""
        images = torch.from_numpy(pixels).to(self.vae.device).permute(0, 3, 1, 2).to(self.vae.dtype)
        latent = self.vae.encode(images / 127.5 - 1.0).latent_dist
        return latent.mean, latent.std

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Last hidden states ``(n, T, D)``, padding included, as Stable Diffusion conditions. Equal texts run once."""
        unique = list(dict.fromkeys(texts))
        window = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(
            unique, padding="max_length", max_length=window, truncation=True, return_tensors="pt"
        )  # fmt: skip
        states = self.text_encoder(tokens["input_ids"].to(self.text_encoder.device)).last_hidden_state
        return states[[unique.index(text) for text in texts]]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """``(C, h, w)`` for square pictures; raises RecipeError where the VAE does not halve ``resolution`` evenly."""
        factor = pixels_per_latent(self.vae.config)
        if resolution % factor:
            raise RecipeError(f"resolution {resolution} is not a multiple of {factor}, the VAE's pixels per latent")
        return (self.vae.config.latent_channels, resolution // factor, resolution // factor)


def square_pair(original: bytes, edited: bytes, pair_id: str, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Two encoded pictures as ``(resolution, resolution, 3)`` uint8: the longer side is cropped, then Lanczos.

    Nothing is stretched. The place of the crop is shared by both and belongs to the pair, so that pictures and cached
    latents train the same targets. The original resizes to a square, whatever the shape.
    """
    chance = unit_uniform("crop", pair_id)
    one, two = (square(decode_image(data), resolution, chance) for data in (original, edited))
    return one, two
