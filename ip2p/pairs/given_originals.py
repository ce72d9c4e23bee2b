"""Pairs whose original image is given: edit-friendly inversion (Huberman-Spiegelglas et al. 2024, section 3).

The paper paints both pictures of a pair, so its model learns from painted originals and is then shown photographs.
Here the original is a picture that there is, and only its edit is painted. The original's way through the noise levels
is drawn at once, with independent noise at every level; what each of its steps lacks to stay on that way is the noise
of the step, and the edited image takes the same. So the original comes back exactly, its twin of the same text too, and
what the edited text does not speak of stays as it is. No text is read and nothing is scored here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch


def edit_given(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    originals: torch.Tensor,
    sigmas: Sequence[float],
    noise: Callable[[], torch.Tensor],
    first: int = 0,
) -> torch.Tensor:
    """Latents ``(N, 2, C, h, w)`` of N pairs: ``originals`` ``(N, C, h, w)``, scaled, and their edits.

    The steps before ``first`` are not taken (the method's T_skip): what the noisiest ones decide, where things are and
    how large, then stays the original's.

    ``denoise`` estimates x_0 of both pictures at a step, ``noise`` draws ``(N, 1, C, h, w)``, once a level above 0. The
    steps are those of ancestral Euler, without their noise; ``sigmas`` fall to 0.
    """
    clean = originals[:, None]
    latents = (clean + sigmas[first] * noise()).expand(-1, 2, -1, -1, -1)
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas[first:]), first):
        denoised = denoise(latents, step)
        means = denoised + (latents - denoised) * (following / sigma) ** 2
        original = clean + following * noise() if following > 0 else clean
        lacking = original - means[:, :1]
        latents = torch.cat([original, means[:, 1:] + lacking], dim=1)
    return latents
