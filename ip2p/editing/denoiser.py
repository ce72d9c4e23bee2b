"""One UNet call a step for n edits: gather the rows they need, predict, combine by guidance, estimate x_0.

What the samplers of ``ip2p.pairs.sampling`` ask for at every step. Every edit of a call has the same size and number
of steps; scales and texts are each edit's own.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping

import torch

from ip2p.editing.guidance import Rows, combine
from ip2p.pairs.sampling import to_denoised
from ip2p.pairs.sigmas import sample_timesteps, sigma_table


class GuidedDenoiser:
    """The guided estimate of x_0 ``(n, C, h, w)`` from noisy latents of that shape at step ``first + i``.

    ``states`` ``(m, T, D)`` and ``images`` ``(m, C, h, w)`` are those of ``rows``; without images (a text-to-image
    UNet) the guidance is over text alone. ``row_evals`` counts the rows that were run.
    """

    def __init__(
        self,
        unet: typing.Any,
        rows: Rows,
        states: torch.Tensor,
        images: torch.Tensor | None,
        scheduler_config: Mapping[str, typing.Any],
        steps: int,
        first: int = 0,
    ):
        self.unet, self.rows = unet, rows.to(unet.device)
        self.states = states.to(unet.device, unet.dtype)
        self.images = None if images is None else images.to(unet.device, unet.dtype)
        self.prediction_type = str(scheduler_config.get("prediction_type", "epsilon"))
        self.sigmas = sigma_table(scheduler_config, steps)[first:].tolist()
        self.timesteps = sample_timesteps(scheduler_config, steps)[first:].float().to(unet.device)
        self.row_evals = 0

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        sigma = self.sigmas[step]
        scaled = (latents / math.sqrt(sigma**2 + 1)).to(self.unet.dtype)[self.rows.edit]
        given = scaled if self.images is None else torch.cat([scaled, self.images], dim=1)
        self.row_evals += len(given)
        predictions = self.unet(given, self.timesteps[step], encoder_hidden_states=self.states).sample
        return to_denoised(combine(predictions, self.rows), latents, sigma, self.prediction_type)
