"""A sampler as numbers: every step of every sampler is x' = a x + b x̂_0 + c x̂_0' + d noise, with its own a, b, c, d.

x̂_0 is this step's guided estimate of the clean latent and x̂_0' the step's before. So edits with other samplers, other
numbers of steps, and at other steps of theirs can advance in one line of arithmetic. The samplers are those of
``ip2p.pairs.sampling``, whose loops the tests hold these numbers against.
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ip2p.editing.guidance import weights_of
from ip2p.pairs.sigmas import sample_timesteps, sigma_table

Coefficients = tuple[float, float, float, float]


@dataclass(frozen=True)
class StepTable:
    """One edit's steps, row by row; float32, on the CPU."""

    timesteps: torch.Tensor  # (N,) what the UNet is told
    sigmas: torch.Tensor  # (N + 1,) noise levels, the last one 0
    coefficients: torch.Tensor  # (N, 4): a, b, c, d
    weights: torch.Tensor  # (N, 3): of the NULL, IMAGE and FULL rows; zero: the row is not run

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def rows(self) -> list[int]:
        """UNet rows of each step."""
        return [int(count) for count in (self.weights != 0).sum(dim=1)]


def step_table(
    scheduler_config: Mapping[str, typing.Any],
    sampler: str,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> StepTable:
    """``sampler`` (a key of COEFFICIENTS) over ``steps`` steps, guided by s_T and s_I.

    ``guidance_interval``: from which to which share of the steps guidance is used (Kynkäänniemi et al. 2024); a step
    outside takes one row, that of image and instruction.
    """
    sigmas = sigma_table(scheduler_config, steps)
    coefficients = COEFFICIENTS[sampler](sigmas.tolist())
    guided = weights_of([guidance_scale], [image_guidance_scale])[0]
    plain = weights_of([1.0], [1.0])[0]
    first, last = guidance_interval
    weights = [guided if first <= step / steps < last else plain for step in range(steps)]
    return StepTable(
        sample_timesteps(scheduler_config, steps).float(), sigmas.float(),
        torch.tensor(coefficients, dtype=torch.float64).float(), torch.stack(weights).float(),
    )  # fmt: skip


def euler_ancestral(sigmas: Sequence[float]) -> list[Coefficients]:
    """To a lower level than asked, and fresh noise up to it."""
    found = []
    for sigma, following in itertools.pairwise(sigmas):
        kept = following**2 / sigma**2  # the lower level over sigma
        up = following * math.sqrt(1 - (following / sigma) ** 2)
        found.append((kept, 1 - kept, 0.0, up))
    return found


def dpmpp_2m(sigmas: Sequence[float]) -> list[Coefficients]:
    """DPM-Solver++(2M): second order by the step before, no noise."""
    found: list[Coefficients] = []
    before = math.inf
    for sigma, following in itertools.pairwise(sigmas):
        if following == 0:
            found.append((0.0, 1.0, 0.0, 0.0))
            break
        length = math.log(sigma / following)
        gain = -math.expm1(-length)
        found.append((following / sigma, gain * (1 + length / (2 * before)), -gain * length / (2 * before), 0.0))
        before = length
    return found


COEFFICIENTS: dict[str, Callable[[Sequence[float]], list[Coefficients]]] = {
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
}
