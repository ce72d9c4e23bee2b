"""What comes before an edit's first step and after its last one: sizes, latents, texts, noise; pixels, mask, size.

Latents of pictures and states of texts are remembered, since people try many instructions on one picture.
"""

from __future__ import annotations

import collections
import hashlib
import typing
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ip2p.editing.edit_bank import EditInputs
from ip2p.editing.edit_request import EditRequest
from ip2p.editing.editor import as_seen
from ip2p.editing.resize import Fitted, crop_to, fit, restore, working_size
from ip2p.editing.step_table import StepTable, step_table
from ip2p.errors import CheckpointError, InputError
from ip2p.models.coding import edit_sizes, is_cut, latents_of, pictures_of, pixels_per_latent, scaled, text_states
from ip2p.models.components import EditModel
from ip2p.pairs.sampling import PairNoise

REMEMBERED = 256  # pictures, and texts


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request at its working size. ``inputs`` is None where there is nothing to be done: an empty instruction."""

    request: EditRequest
    fitted: Fitted
    inputs: EditInputs | None
    cut: bool = False  # a text is longer than the text encoder reads


class Preparer:
    """Turns requests into what an EditBank takes; for use by one thread at a time."""

    def __init__(self, model: EditModel):
        self.model = model
        self.multiple, self.resolution = edit_sizes(model)
        self._latents, self._texts = Remembered(), Remembered()

    def check_size(self, request: EditRequest) -> None:
        """Raise InputError for a size that this model cannot edit at."""
        if request.size is None:
            height, width = request.image.shape[:2]
            working_size(width, height, request.resolution or self.resolution, self.multiple)
        elif any(side < self.multiple or side % self.multiple for side in request.size):
            width, height = request.size
            raise InputError(f"size {width}x{height}: both sides must be multiples of {self.multiple} for this model")

    def table(self, request: EditRequest) -> StepTable:
        """The request's steps; the model's own scales where it names none."""
        scales = self.model.scales(request.guidance_scale, request.image_guidance_scale)
        config = self.model.scheduler_config
        return step_table(config, request.sampler, request.steps, *scales, request.guidance_interval)

    @torch.inference_mode()
    def prepare(self, request: EditRequest, table: StepTable) -> Prepared:
        """``table`` is that of the request, whose size is checked."""
        fitted = self._fitted(request, request.image)
        if not request.instruction.strip():
            return Prepared(request, fitted, None)
        key = (fitted.pixels.shape, hashlib.sha256(fitted.pixels.tobytes()).digest())
        image, clean = self._latents(key, lambda: self._encoded(fitted))
        mask = None if request.mask is None else self._latent_mask(self._fitted(request, _as_picture(request.mask)))
        text, null = self._text(request.instruction), self._text(request.negative_prompt)
        inputs = EditInputs(image, text, null, self._noise(request, image.shape), table, mask, clean)
        return Prepared(request, fitted, inputs, any(map(self._is_cut, (request.instruction, request.negative_prompt))))

    def _fitted(self, request: EditRequest, picture: np.ndarray) -> Fitted:
        if request.size is not None:
            return crop_to(picture, request.size)
        return fit(picture, request.resolution or self.resolution, self.multiple, request.restore_size)

    def _encoded(self, fitted: Fitted) -> tuple[torch.Tensor, torch.Tensor]:
        """The original's latent as the UNet sees it, and as the sampler does."""
        mode = latents_of(self.model.vae, [fitted.pixels])[0]
        return as_seen(self.model, mode), scaled(self.model.vae, mode)

    def _text(self, text: str) -> torch.Tensor:
        return typing.cast(torch.Tensor, self._texts(text, lambda: text_states(self.model, [text])[0]))

    def _is_cut(self, text: str) -> bool:
        return is_cut(self.model.tokenizer, self.model.text_encoder, text)

    def _noise(self, request: EditRequest, shape: torch.Size) -> torch.Tensor:
        noise = PairNoise([request.seed], (shape[0], shape[1], shape[2]))
        count = request.steps if request.sampler == "euler_ancestral" else 1
        return torch.cat([noise()[:, 0] for _ in range(count)])

    def _latent_mask(self, fitted: Fitted) -> torch.Tensor:
        """``(1, h, w)``: 1 where any pixel of the cell may be edited, so that the edit has room up to its border."""
        pixels = torch.from_numpy(np.array(fitted.pixels[:, :, 0])).float()[None, None]
        return (torch.nn.functional.max_pool2d(pixels, pixels_per_latent(self.model.vae.config))[0] > 0).float()


@torch.inference_mode()
def finished_picture(model: EditModel, prepared: Prepared, latent: torch.Tensor | None) -> np.ndarray:
    """The edited picture ``(H, W, 3)`` uint8 of a finished ``latent`` ``(C, h, w)``; None: the picture as it came.

    Where a mask keeps a pixel, it is the original's to the bit. Raises CheckpointError for a latent of NaN or Inf.
    """
    request, fitted = prepared.request, prepared.fitted
    if latent is None:
        return fitted.original.copy() if request.restore_size else fitted.pixels.copy()
    if not bool(latent.isfinite().all()):
        raise CheckpointError(
            f"the UNet gave NaN or Inf as {model.unet.dtype}; load it as float32 or bfloat16, or take lower scales"
        )
    edited = pictures_of(model.vae, latent[None])[0]
    if request.restore_size:
        return _composed(restore(edited, fitted), fitted.original, request.mask)
    mask = request.mask
    if mask is not None:
        height, width = edited.shape[:2]
        mask = crop_to(_as_picture(mask), (width, height)).pixels[:, :, 0]
    return _composed(edited, fitted.pixels, mask)


def _composed(edited: np.ndarray, original: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """``edited`` where ``mask`` is 255, ``original`` where it is 0, between them in proportion."""
    if mask is None:
        return edited
    share = mask[:, :, None].astype(np.float32) / 255
    return np.rint(edited * share + original * (1 - share)).astype(np.uint8)


def _as_picture(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[:, :, None], 3, axis=2)


class Remembered:
    """The REMEMBERED values asked for last."""

    def __init__(self) -> None:
        self.values: collections.OrderedDict[typing.Hashable, typing.Any] = collections.OrderedDict()
        self.hits = 0

    def __call__(self, key: typing.Hashable, make: Callable[[], typing.Any]) -> typing.Any:
        if key in self.values:
            self.hits += 1
        else:
            self.values[key] = make()
        self.values.move_to_end(key)
        while len(self.values) > REMEMBERED:
            self.values.popitem(last=False)
        return self.values[key]
