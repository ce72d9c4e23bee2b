"""Conditioning dropout: sometimes the UNet learns without text, without image, or without both (section 3.2.1).

This is what makes guidance by both conditions possible. One uniform a sample decides, as in the original: below 5 % the
text goes, from 5 to 10 % both, from 10 to 15 % the image. Nothing is drawn here.
"""

from __future__ import annotations

import torch


def dropped(uniforms: torch.Tensor, rate: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """``(no_text, no_image)``, both ``(n,)`` bool, for ``uniforms`` ``(n,)`` in [0, 1) and the chance of each kind."""
    no_text = uniforms < 2 * rate
    no_image = (uniforms >= rate) & (uniforms < 3 * rate)
    return no_text, no_image


def drop_conditions(
    text_states: torch.Tensor,
    image_latents: torch.Tensor,
    null_state: torch.Tensor,
    uniforms: torch.Tensor,
    rate: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace dropped texts by ``null_state`` and dropped images by zero latents (not by an encoded grey picture).

    ``text_states`` ``(n, T, D)``, ``image_latents`` ``(n, C, h, w)``, ``null_state`` ``(T, D)``, ``uniforms`` ``(n,)``.
    """
    no_text, no_image = (mask.to(image_latents.device) for mask in dropped(uniforms, rate))
    texts = torch.where(no_text[:, None, None], null_state.to(text_states.dtype), text_states)
    return texts, image_latents.masked_fill(no_image[:, None, None, None], 0.0)
