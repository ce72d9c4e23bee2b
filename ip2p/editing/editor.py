"""The editor: pictures and instructions in, edited pictures out (InstructPix2Pix, section 3.2).

Many edits share a UNet call, each with its own scales, seed and texts, and each comes out as if it were alone, to the
rounding of batched arithmetic (1/255). Edits that join and leave at any step are not here: all edits of a call take the
same number of steps.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ip2p.editing.denoiser import GuidedDenoiser
from ip2p.editing.guidance import needed_rows, row_images, row_states
from ip2p.editing.resize import Fitted, fit, restore
from ip2p.errors import CheckpointError, InputError
from ip2p.models.coding import edit_sizes, latents_of, pictures_of, text_states
from ip2p.models.components import EditModel
from ip2p.pairs.sampling import SAMPLERS, PairNoise
from ip2p.pairs.sigmas import sigma_table

MAX_SCALE = 1000.0


@dataclass(frozen=True)
class Request:
    """One edit of a call, after its picture was fitted."""

    fitted: Fitted
    instruction: str
    negative_prompt: str
    seed: int
    guidance_scale: float
    image_guidance_scale: float


class Editor:
    """Edits pictures with one model. ``edits_per_call`` bounds the memory of a call, three UNet rows an edit."""

    def __init__(self, model: EditModel, edits_per_call: int = 8):
        self.model, self.edits_per_call = model, edits_per_call
        self.multiple, self.resolution = edit_sizes(model)
        self.row_evals = 0

    @torch.inference_mode()
    def edit(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        *,
        steps: int = 100,
        guidance_scale: float | Sequence[float] | None = None,
        image_guidance_scale: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] = "",
        resolution: int | None = None,
        sampler: str = "euler_ancestral",
        restore_size: bool = False,
        on_step: Callable[[], object] | None = None,
    ) -> list[np.ndarray]:
        """Edit n pictures ``(H, W, 3)`` uint8 of any sizes; returns n of them. The defaults are the original's.

        A single scale, seed or negative prompt is every edit's. Scales of None are the model's own (7.5 and 1.5 unless
        its maker says otherwise). ``resolution`` (pixels; None: the model's own) goes
        into the size rule of ``ip2p.editing.resize``. With ``restore_size`` nothing is cut off and results have the
        size of their inputs; otherwise results have the working size, cut as the original cuts. An empty instruction
        gives the resized input, unedited. ``negative_prompt`` takes the place of the empty text.

        ``sampler`` is euler_ancestral or dpmpp_2m. An edit's noise is drawn on the CPU from its own seed: x_T first,
        then one draw a step. ``on_step`` is called after each step of each call.

        Raises InputError for values that cannot be used, CheckpointError where the model's answer is not finite.
        """
        side = self.resolution if resolution is None else resolution
        for image in images:
            check_picture(image)
        fitted = [fit(image, side, self.multiple, restore_size) for image in images]
        scales = self.model.scales(guidance_scale, image_guidance_scale)
        columns = (instructions, negative_prompt, seed, *scales)
        values = zip(*(_for_each(column, len(fitted)) for column in columns), strict=True)
        requests = [Request(one, *rest) for one, rest in zip(fitted, values, strict=True)]
        for request in requests:
            check_settings(steps, sampler, request.seed, request.guidance_scale, request.image_guidance_scale)
        edited = [one.original if restore_size else one.pixels for one in fitted]
        for places in self._calls(requests):
            made = self._edit([requests[place] for place in places], steps, sampler, on_step)
            for place, pixels in zip(places, made, strict=True):
                edited[place] = restore(pixels, fitted[place]) if restore_size else pixels
        return edited

    def _calls(self, requests: Sequence[Request]) -> Iterable[list[int]]:
        """Places of the edits that share a call: those of one size, without the empty instructions."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, request in enumerate(requests):
            if request.instruction.strip():
                sizes.setdefault(request.fitted.pixels.shape, []).append(place)
        for places in sizes.values():
            yield from (places[i : i + self.edits_per_call] for i in range(0, len(places), self.edits_per_call))

    def _edit(
        self, requests: Sequence[Request], steps: int, sampler: str, on_step: Callable[[], object] | None
    ) -> list[np.ndarray]:
        """The edits of one call, ``(h, w, 3)`` uint8 each."""
        images = image_latents(self.model, [request.fitted.pixels for request in requests])
        latents = self._sampled(requests, images, steps, sampler, on_step)
        if not bool(latents.isfinite().all()):
            raise CheckpointError(
                f"the UNet gave NaN or Inf as {self.model.unet.dtype}; load it as float32 or bfloat16 (`--dtype`)"
            )
        return pictures_of(self.model.vae, latents)

    def _sampled(
        self,
        requests: Sequence[Request],
        images: torch.Tensor,
        steps: int,
        sampler: str,
        on_step: Callable[[], object] | None,
    ) -> torch.Tensor:
        unet, config = self.model.unet, self.model.scheduler_config
        rows = needed_rows(
            [request.guidance_scale for request in requests], [request.image_guidance_scale for request in requests]
        ).to(images.device)
        states = text_states(self.model, [request.instruction for request in requests])
        nulls = text_states(self.model, [request.negative_prompt for request in requests])
        denoise = GuidedDenoiser(unet, rows, row_states(rows, states, nulls), row_images(rows, images), config, steps)
        channels, height, width = images.shape[1:]
        noise = PairNoise([int(request.seed) for request in requests], (channels, height, width), unet.device)

        def one_step(latents: torch.Tensor, step: int) -> torch.Tensor:
            denoised = denoise(latents, step)
            if on_step is not None:
                on_step()
            return denoised

        sigmas = sigma_table(config, steps).tolist()
        latents = SAMPLERS[sampler](one_step, noise()[:, 0] * sigmas[0], sigmas, lambda: noise()[:, 0])
        self.row_evals += denoise.row_evals
        return latents


def image_latents(model: EditModel, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """What the UNet is shown of uint8 pictures ``(n, C, h, w)``: their latents in the convention of the model."""
    return as_seen(model, latents_of(model.vae, pictures))


def as_seen(model: EditModel, modes: torch.Tensor) -> torch.Tensor:
    """Modes of posteriors as the UNet is shown them, in the convention of the model."""
    return modes * (model.vae.config.scaling_factor if model.image_latent_scaled else 1.0)


def check_picture(image: np.ndarray) -> None:
    """Raise InputError for an array that is no RGB picture."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"picture of shape {image.shape}, {image.dtype}: expected (H, W, 3), uint8")


def check_settings(
    steps: int, sampler: str, seed: int, guidance_scale: float | None, image_guidance_scale: float | None
) -> None:
    """Raise InputError where an edit cannot be made so; a scale of None is the model's own."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
        if scale is not None and not 0 <= scale <= MAX_SCALE:
            raise InputError(f"{name} must be between 0 and {MAX_SCALE:g}, got {scale}")


def _for_each(value: typing.Any, count: int) -> list[typing.Any]:
    """A list of ``count`` values: ``value`` itself where it is a sequence of that length, else ``value`` repeated."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{len(value)} values for {count} pictures; give one, or one a picture")
    return list(value)
