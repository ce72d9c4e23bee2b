"""The moving average of the weights, which is what gets exported: decay 0.9999, ramped up at the start.

Updated once an optimizer step. The original updates once a micro-batch, so four times as often at its batch of 1024.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ip2p.training.sharding import fill, local


def decay_at(updates: int, decay: float) -> float:
    """The decay of update number ``updates`` (the first is 1): ``min(decay, (1 + n) / (10 + n))`` (the original's)."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Averages of named parameters, kept beside them on their device and in float32."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float):
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], updates: int) -> None:
        """Move towards ``parameters``; ``updates`` counts this one too."""
        averages = local(self.averages.values())
        now = local(parameters[name].detach().float() for name in self.averages)
        torch._foreach_lerp_(averages, now, 1.0 - decay_at(updates, self.decay))

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside of it ``parameters`` hold the averages, for a look at held-out pairs or an export."""
        kept = {name: parameters[name].detach().clone() for name in self.averages}
        copy_into(parameters, self.averages)
        try:
            yield
        finally:
            copy_into(parameters, kept)


@torch.no_grad()
def copy_into(parameters: Mapping[str, torch.Tensor], values: Mapping[str, typing.Any]) -> None:
    """Copy each of ``values`` into the parameter of its name."""
    for name, value in values.items():
        fill(parameters[name], value)
