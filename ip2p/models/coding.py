"""Between people's data and a model's: pictures and latents, texts and hidden states. Nothing is painted here.

Pictures and texts are encoded one by one, so that the bits of an item never depend on what else a call holds, and so
that an autoencoder's memory at 512 pixels does not grow with it.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np
import torch

from ip2p.images import to_uint8


def latents_of(vae: typing.Any, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 ``(H, W, 3)`` pictures of one size to the modes of their posteriors ``(n, C, h, w)``, not scaled."""
    modes = []
    for picture in pictures:
        unit = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(vae.device, vae.dtype)
        modes.append(vae.encode(unit / 127.5 - 1).latent_dist.mode())
    return torch.cat(modes)


def scaled(vae: typing.Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents of ``vae``, as ``latents_of`` gives them, shifted and scaled as its UNet expects."""
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: typing.Any, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents ``(n, C, h, w)`` to images ``(n, 3, H, W)`` float32 in [0, 1]; NaN and Inf stay what they are."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample.float() / 2 + 0.5
    return images.clamp(0, 1).where(images.isfinite(), images)  # clamp alone makes white of Inf


def pictures_of(vae: typing.Any, latents: torch.Tensor) -> list[np.ndarray]:
    """Scaled latents ``(n, C, h, w)`` to pictures ``(H, W, 3)`` uint8, rounded to nearest."""
    images = [decode_latents(vae, one[None])[0] for one in latents]
    return [to_uint8(image.permute(1, 2, 0).cpu().numpy()) for image in images]


def token_ids(tokenizer: typing.Any, text_encoder: typing.Any, text: str) -> list[int]:
    """CLIP's tokens of ``text``, cut or filled to the encoder's window (77)."""
    window = text_encoder.config.max_position_embeddings
    return list(tokenizer(text, padding="max_length", max_length=window, truncation=True)["input_ids"])


def is_cut(tokenizer: typing.Any, text_encoder: typing.Any, text: str) -> bool:
    """Whether ``text`` is longer than the encoder's window, so that its end goes unread."""
    return len(tokenizer(text)["input_ids"]) > text_encoder.config.max_position_embeddings


def text_state(text_encoder: typing.Any, ids: Sequence[int]) -> torch.Tensor:
    """``(T, D)`` float32: the last hidden states of one text, after the final norm."""
    return text_encoder(torch.tensor([list(ids)], device=text_encoder.device)).last_hidden_state[0]


def text_states(model: typing.Any, texts: Sequence[str]) -> torch.Tensor:
    """``(n, T, D)`` hidden states of ``texts`` under ``model.tokenizer`` and ``model.text_encoder``."""
    known = {
        text: text_state(model.text_encoder, token_ids(model.tokenizer, model.text_encoder, text))
        for text in dict.fromkeys(texts)
    }
    return torch.stack([known[text] for text in texts])


def edit_sizes(model: typing.Any) -> tuple[int, int]:
    """In pixels: what an edit's sides are multiples of (64 for Stable Diffusion), and the model's own resolution."""
    unet, factor = model.unet.config, pixels_per_latent(model.vae.config)
    return factor * 2 ** (len(unet.block_out_channels) - 1), int(unet.sample_size) * factor


def pixels_per_latent(vae_config: typing.Any) -> int:
    """By how much the autoencoder makes a side smaller: 8 for Stable Diffusion."""
    return int(2 ** (len(vae_config.block_out_channels) - 1))
