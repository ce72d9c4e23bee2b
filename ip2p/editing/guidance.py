"""Classifier-free guidance over two conditions, the image and the instruction (InstructPix2Pix, section 3.2.1).

    e(∅,0) + s_I (e(∅,I) − e(∅,0)) + s_T (e(T,I) − e(∅,I))
    = (1 − s_I) e(∅,0) + (s_I − s_T) e(∅,I) + s_T e(T,I)

Rows whose weight in the second line is exactly zero are not run: s_I = 1 or s_I = s_T takes two rows, both 1 takes
one, and the answer is the same. Any s_T, s_I >= 0 is guided; the weights sum to 1, so that predictions of the noise,
of v and of the clean latent may all be combined so. Nothing here knows a model or a sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

NULL, IMAGE, FULL = range(3)
"""What a row sees: nothing, the image, the image and the instruction."""


class Rows(NamedTuple):
    """The m UNet rows that n edits need at a step, edit by edit."""

    edit: torch.Tensor  # (m,) int64: whose row
    sees: torch.Tensor  # (m,) int64: NULL, IMAGE or FULL
    weights: torch.Tensor  # (n, 3) float32: of NULL, IMAGE and FULL in each edit's answer

    def to(self, device: torch.device | str) -> Rows:
        return Rows(*(part.to(device) for part in self))


def needed_rows(guidance_scales: Sequence[float], image_guidance_scales: Sequence[float]) -> Rows:
    """The rows of n edits with s_T and s_I >= 0, without those of weight zero."""
    weights = weights_of(guidance_scales, image_guidance_scales)
    edit, sees = weights.nonzero(as_tuple=True)
    return Rows(edit, sees, weights.float())


def weights_of(guidance_scales: Sequence[float], image_guidance_scales: Sequence[float]) -> torch.Tensor:
    """The weights of NULL, IMAGE and FULL in the answers of n edits, ``(n, 3)``.

    float64, so that only scales that are equal make a weight of zero.
    """
    text = torch.tensor(guidance_scales, dtype=torch.float64)
    image = torch.tensor(image_guidance_scales, dtype=torch.float64)
    return torch.stack([1 - image, image - text, text], dim=1)


def row_states(rows: Rows, states: torch.Tensor, null_states: torch.Tensor) -> torch.Tensor:
    """The text of each row ``(m, T, D)``, from the instructions and the null texts of n edits ``(n, T, D)``."""
    reads = (rows.sees == FULL)[:, None, None]
    return torch.where(reads, states[rows.edit], null_states[rows.edit])


def row_images(rows: Rows, image_latents: torch.Tensor) -> torch.Tensor:
    """The image latent of each row ``(m, C, h, w)``: its edit's, or zero, which is the null image."""
    images = image_latents[rows.edit]
    return torch.where((rows.sees != NULL)[:, None, None, None], images, torch.zeros_like(images))


def combine(predictions: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Predictions of the m rows ``(m, ...)`` to the guided ones of n edits ``(n, ...)``, float32 or wider."""
    count = len(rows.weights)
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    slots = wide.new_zeros((count, 3, *wide.shape[1:]))
    slots[rows.edit, rows.sees] = wide
    weights = rows.weights.to(wide.dtype).view(count, 3, *[1] * (wide.dim() - 1))
    return (slots * weights).sum(dim=1)
