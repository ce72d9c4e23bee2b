"""Painting many pairs in one UNet batch: shared noise, guidance, samplers and the Prompt-to-Prompt window.

InstructPix2Pix, section 3.1.2, as the released code runs it: Euler-ancestral on denoised predictions, guidance on
those too, one x_T and one stream of noise per pair, attention shared while ``i / (steps - 1) < p``. Where the released
code paints one pair at a time this file paints N, and each comes out as if it were alone. Where originals are given,
``ip2p.pairs.given_originals`` takes the steps. No decoding, no scoring.
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ip2p.pairs.alignment import Alignment
from ip2p.pairs.given_originals import edit_given
from ip2p.pairs.prompt_to_prompt import PromptToPrompt
from ip2p.pairs.sigmas import sample_timesteps, sigma_table

Denoise = Callable[[torch.Tensor, int], torch.Tensor]
Noise = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class PairTexts:
    """What N candidates are painted from. ``alignments`` are needed by mode ``cross`` only, one a candidate."""

    states: torch.Tensor  # (N, 2, T, D): caption, edited caption
    null_state: torch.Tensor  # (T, D): the empty text
    alignments: Sequence[Alignment] | None = None


@dataclass(frozen=True)
class SamplerSettings:
    """What all candidates of a call have in common."""

    scheduler_config: Mapping[str, typing.Any]
    steps: int
    sampler: str = "euler_ancestral"  # euler_ancestral | dpmpp_2m
    p2p_mode: str = "self"  # self | cross | off
    latent_shape: tuple[int, int, int] = (4, 64, 64)
    skip: float = 0.0  # share of the steps that edits of given originals do not take


def sample_pairs(
    unet: typing.Any,
    texts: PairTexts,
    seeds: Sequence[int],
    p2p_thresholds: Sequence[float],
    guidance_scales: Sequence[float],
    settings: SamplerSettings,
    originals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Paint N pairs, or the edits of N ``originals``.

    Returns latents ``(N, 2, C, h, w)``, original first, and the number of UNet rows that were run.

    Latents are float32 between calls, whatever the UNet's precision below that (float64 for a float64 UNet).

    A candidate's noise comes from its own CPU generator: x_T ``(C, h, w)``, then one draw a step, the same for both
    pictures of the pair. So a candidate does not depend on its neighbours, beyond the rounding of batched arithmetic.
    ``originals`` ``(N, C, h, w)`` are scaled latents; theirs are the steps of ancestral Euler, whatever ``settings``
    says.
    """
    noise = PairNoise(seeds, settings.latent_shape, unet.device, torch.promote_types(unet.dtype, torch.float32))
    sigmas = sigma_table(settings.scheduler_config, settings.steps).tolist()
    sharing = PromptToPrompt(unet, settings.p2p_mode)
    with sharing.installed():
        denoise = PairDenoiser(unet, sharing, texts, p2p_thresholds, guidance_scales, settings)
        if originals is None:
            start = noise().repeat(1, 2, 1, 1, 1) * sigmas[0]
            latents = SAMPLERS[settings.sampler](denoise, start, sigmas, noise)
        else:
            first = round(settings.skip * settings.steps)
            latents = edit_given(denoise, originals.to(noise.device, noise.dtype), sigmas, noise, first)
    return latents, denoise.row_evals


class PairNoise:
    """One stream of unit noise a candidate: each call draws ``(N, 1, C, h, w)`` on the CPU, for any device alike."""

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape, self.device, self.dtype = shape, device, dtype

    def __call__(self) -> torch.Tensor:
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn)[:, None].to(self.device, self.dtype)


class PairDenoiser:
    """The guided, tied estimate of x_0 for N pairs: ``(N, 2, C, h, w)`` at step i to the same shape.

    The 4 N rows of a UNet call lie in four blocks: null | original, null | edited, caption | original,
    caption | edited. Blocks 1 and 3 share with blocks 0 and 2: both halves of the guidance are tied. Where every scale
    is 1 the null texts have no say, and the first two blocks are not run.
    """

    def __init__(
        self,
        unet: typing.Any,
        sharing: PromptToPrompt,
        texts: PairTexts,
        p2p_thresholds: Sequence[float],
        guidance_scales: Sequence[float],
        settings: SamplerSettings,
    ):
        self.unet, self.sharing, self.settings = unet, sharing, settings
        self.count = len(p2p_thresholds)
        self.thresholds = torch.tensor(p2p_thresholds, dtype=torch.float64)
        self.guidance = (
            torch.tensor(guidance_scales, dtype=torch.float32, device=unet.device).repeat(2).view(-1, 1, 1, 1)
        )
        self.sigmas = sigma_table(settings.scheduler_config, settings.steps).tolist()
        self.timesteps = sample_timesteps(settings.scheduler_config, settings.steps).float().to(unet.device)
        self.halves = 1 if all(scale == 1 for scale in guidance_scales) else 2
        null = texts.null_state.expand(2 * self.count * (self.halves - 1), -1, -1)
        self.states = torch.cat([null, texts.states.transpose(0, 1).flatten(0, 1)]).to(unet.device, unet.dtype)
        blocks = torch.arange(2 * self.halves * self.count).view(self.halves, 2, self.count)
        self.source = blocks[:, [0, 0]].flatten()
        self.share: torch.Tensor | None = None
        self.own: torch.Tensor | None = None
        if settings.p2p_mode == "cross" and texts.alignments is not None:
            self.share, self.own = _row_alignments(texts.alignments, self.halves)
            self.share = self.share.to(unet.device)
        self.row_evals = 0

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        sigma = self.sigmas[step]
        pictures = latents.transpose(0, 1).flatten(0, 1)
        self._tie(step)
        rows = torch.cat([pictures] * self.halves)
        prediction = self._predict(rows / math.sqrt(sigma**2 + 1), step).to(rows.dtype)
        denoised = to_denoised(
            prediction, rows, sigma, self.settings.scheduler_config.get("prediction_type", "epsilon")
        )
        if self.halves == 2:
            null, caption = denoised.chunk(2)
            denoised = null + (caption - null) * self.guidance.to(null.dtype)
        return denoised.unflatten(0, (2, self.count)).transpose(0, 1)

    def _tie(self, step: int) -> None:
        shares = sharing_steps(self.thresholds, step, self.settings.steps)
        off = torch.zeros_like(shares)
        self.sharing.set_rows(torch.cat([off, shares] * self.halves), self.source, self.share, self.own)

    def _predict(self, scaled: torch.Tensor, step: int) -> torch.Tensor:
        self.row_evals += len(scaled)
        given = scaled.to(self.unet.dtype)
        return self.unet(given, self.timesteps[step], encoder_hidden_states=self.states).sample


def sharing_steps(p2p_thresholds: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """Whether each threshold p shares attention at ``step`` of ``steps``: ``i / (steps - 1) < p``, strictly."""
    return step / (steps - 1) < p2p_thresholds


def to_denoised(
    prediction: torch.Tensor, latents: torch.Tensor, sigma: float | torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """What a prediction at ``latents`` = x_0 + sigma * noise says x_0 is; ``sigma`` one for all, or one a row.

    ``epsilon`` is the noise; ``v_prediction`` is ``(noise - sigma * x_0) / sqrt(sigma^2 + 1)`` (Salimans & Ho 2022).
    """
    if prediction_type == "epsilon":
        return latents - sigma * prediction
    if prediction_type == "v_prediction":
        scale = math.sqrt(sigma**2 + 1) if isinstance(sigma, float) else (sigma**2 + 1).sqrt()
        return latents / (sigma**2 + 1) - prediction * (sigma / scale)
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: epsilon, v_prediction")


def euler_ancestral(denoise: Denoise, latents: torch.Tensor, sigmas: Sequence[float], noise: Noise) -> torch.Tensor:
    """Euler steps to a lower level than asked, and fresh noise up to it (k-diffusion's ancestral Euler with eta 1)."""
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(latents, step)
        down, up = following**2 / sigma, following * math.sqrt(1 - (following / sigma) ** 2)
        latents = denoised + (latents - denoised) * (down / sigma)
        if following > 0:
            latents = latents + noise() * up
    return latents


def dpmpp_2m(denoise: Denoise, latents: torch.Tensor, sigmas: Sequence[float], noise: Noise) -> torch.Tensor:
    """DPM-Solver++(2M), data prediction, second order by the previous step (Lu et al. 2022); ``noise`` is not drawn."""
    before: torch.Tensor | None = None
    length_before = 0.0
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(latents, step)
        if following == 0:
            return denoised
        length = math.log(sigma / following)
        estimate = denoised
        if before is not None:
            estimate = denoised + (denoised - before) * (length / (2 * length_before))
        latents = latents * (following / sigma) - math.expm1(-length) * estimate
        before, length_before = denoised, length
    return latents


SAMPLERS: dict[str, Callable[[Denoise, torch.Tensor, Sequence[float], Noise], torch.Tensor]] = {
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
}


def _row_alignments(alignments: Sequence[Alignment], halves: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``share`` (R, T, T) and ``own`` (R, T) in the order of the rows; null texts align with themselves."""
    share = torch.stack([torch.from_numpy(alignment.share) for alignment in alignments])
    own = torch.stack([torch.from_numpy(alignment.own) for alignment in alignments])
    same = torch.eye(share.shape[1]).expand_as(share)
    none = torch.zeros_like(own)
    nulls = 2 * (halves - 1)
    return torch.cat([same] * nulls + [share, share]), torch.cat([none] * nulls + [own, own])
