"""Muon: weight matrices move by the orthogonal matrix nearest to their momentum, everything else by AdamW.

Jordan 2024 ("Muon: an optimizer for hidden layers in neural networks"), with steps as long as AdamW's (Liu et al. 2025,
arXiv 2502.16982, section 2.2), so that one learning rate serves both. It pays where an edit model is trained further,
not in the first minutes from a text-to-image model (docs/measurements.md). torch.optim.Muon takes two-dimensional
weights alone, and its bfloat16 is slow on CPUs.
"""

from __future__ import annotations

import collections
import typing
from collections.abc import Iterator, Mapping, Sequence

import torch

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic Newton-Schulz iteration: singular values come to lie within about 0.7..1.2."""
STEP_OF_ADAMW = 0.2
"""Root mean square of AdamW's usual step in units of the learning rate (Liu et al.)."""
FIRST_AND_LAST = ("conv_in.", "conv_out.")
"""Layers that read latents and write noise are no maps between features; as is usual, AdamW moves them."""
BUFFER = "momentum"
STACK_BYTES = 2**28  # matrices of a shape are made orthogonal together, but never more than this of them


class Muon:
    """In the shape of a torch optimizer, as far as a training uses one: zero_grad, step, state and param_groups.

    ``parameters`` by name. Each worker computes the whole step, so weights may not be sharded.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, weight_decay: float):
        self.matrices = [p for name, p in parameters.items() if is_matrix(name, p)]
        others = [p for name, p in parameters.items() if not is_matrix(name, p)]
        self.adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, fused=True)
        self.param_groups: list[dict[str, typing.Any]] = self.adamw.param_groups
        self.state = self.adamw.state  # AdamW looks at its own parameters' only
        self.weight_decay = weight_decay

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adamw.zero_grad(set_to_none)
        for p in self.matrices:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        learning_rate = self.param_groups[0]["lr"]
        moved: list[torch.Tensor] = [p for p in self.matrices if p.grad is not None]
        if not moved:
            return
        gradients = [typing.cast(torch.Tensor, p.grad) for p in moved]
        momenta = [self._momentum(p) for p in moved]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        torch._foreach_mul_(moved, 1 - learning_rate * self.weight_decay)
        for same in _of_one_shape(directions):
            updates = orthogonal(torch.stack([directions[place].flatten(1) for place in same]))
            length = learning_rate * STEP_OF_ADAMW * max(updates.shape[1:]) ** 0.5
            for place, update in zip(same, updates, strict=True):
                moved[place].add_(update.reshape(moved[place].shape), alpha=-length)

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        held = self.state[matrix]
        if BUFFER not in held:
            held[BUFFER] = torch.zeros_like(matrix)
        return held[BUFFER]


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon moves it: a layer's weight, a convolution's as (out, in x height x width)."""
    return parameter.ndim >= 2 and not name.startswith(FIRST_AND_LAST)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Of each of ``(n, a, b)`` about the nearest orthogonal matrix, by Newton-Schulz iterations in float32."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


def _of_one_shape(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Places of ``tensors`` that are alike as matrices, in stacks of at most STACK_BYTES (or one)."""
    places: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for place, tensor in enumerate(tensors):
        places[tensor.shape[0], tensor[0].numel()].append(place)
    for same in places.values():
        many = max(1, STACK_BYTES // tensors[same[0]].nbytes)
        yield from (same[first : first + many] for first in range(0, len(same), many))
