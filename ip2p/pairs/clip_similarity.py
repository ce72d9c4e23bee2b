"""The four CLIP similarities by which candidates are judged (InstructPix2Pix, section 3.1.2; Gal et al. 2021).

Pictures are prepared as in the released code, by one plain bicubic resize without antialiasing and without a crop,
and not as CLIP's own transform does it: thresholds are only comparable under the same preparation. Scores are taken
from the decoder's floats, before any rounding to 8 bits.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

if typing.TYPE_CHECKING:
    from ip2p.models.components import Clip

REMEMBERED_TEXTS = 256
NO_CHANGE = 1e-4
"""Difference of unit vectors below which two pictures are the same: rounding moves them by 1e-6, edits by 1e-1."""


class Similarities(NamedTuple):
    """Cosines in [-1, 1], each ``(N,)`` float32 on the CPU; ``direction`` compares the changes, not the pictures."""

    original: torch.Tensor
    edited: torch.Tensor
    image: torch.Tensor
    direction: torch.Tensor


class ClipSimilarity:
    """Scores pairs against their captions with one CLIP."""

    def __init__(self, clip: Clip):
        self.model = clip.model
        self.tokenizer: Callable[[list[str]], torch.Tensor] = clip.tokenizer
        self.image_size = clip.image_size
        self.device = next(clip.model.parameters()).device
        self.mean = torch.tensor(clip.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(clip.std, device=self.device).view(1, 3, 1, 1)
        self._texts: dict[str, torch.Tensor] = {}

    def __call__(
        self, original_images: torch.Tensor, edited_images: torch.Tensor, caption: str, edited_caption: str
    ) -> Similarities:
        """Score N pairs ``(N, 3, H, W)`` in [0, 1] of one prompt."""
        count = len(original_images)
        images = self.image_features(torch.cat([original_images, edited_images]))
        original, edited = images[:count], images[count:]
        text, edited_text = self.text_feature(caption), self.text_feature(edited_caption)
        cosines = (
            F.cosine_similarity(original, text[None]),
            F.cosine_similarity(edited, edited_text[None]),
            F.cosine_similarity(original, edited),
            direction(edited - original, (edited_text - text)[None]),
        )
        return Similarities(*(cosine.float().cpu() for cosine in cosines))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """``(N, 3, H, W)`` in [0, 1] to unit vectors ``(N, D)``."""
        size = (self.image_size, self.image_size)
        resized = F.interpolate(images.to(self.device).float(), size=size, mode="bicubic", align_corners=False)
        return F.normalize(self.model.encode_image((resized - self.mean) / self.std), dim=-1)

    def text_feature(self, text: str) -> torch.Tensor:
        """The unit vector ``(D,)`` of a text. Encoded alone, so that its bits never depend on what was asked before."""
        if text not in self._texts:
            if len(self._texts) >= REMEMBERED_TEXTS:
                self._texts.pop(next(iter(self._texts)))
            tokens = self.tokenizer([text]).to(self.device)
            self._texts[text] = F.normalize(self.model.encode_text(tokens), dim=-1)[0]
        return self._texts[text]


def direction(change: torch.Tensor, text_change: torch.Tensor) -> torch.Tensor:
    """Cosine of both changes ``(N, D)``; 0 where a picture did not change, whose roundings point anywhere."""
    cosine = F.cosine_similarity(change, text_change)
    return cosine.where(change.norm(dim=-1) > NO_CHANGE, 0.0)
