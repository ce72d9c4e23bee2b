"""Micro-batches side by side on one CPU worker, each in a thread of its own.

A small UNet's operations are too short to be shared out: two threads that work on each of them together wait for each
other thousands of times a step. Two that go through the UNet each with its own samples do not, and unlike two workers
they have one optimizer and send no gradients (numbers in docs/measurements.md).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

LANE_BYTES = 2**28
"""Trained weights above which lanes are not worth it: operations are long then, and each lane has gradients."""

Losses = Callable[[], torch.Tensor]
"""Computes the losses of a micro-batch, a number a sample."""

Gradients = Sequence[torch.Tensor | None]


class Lanes:
    """``count`` threads; with 1, all is done by the calling thread. Use as a context manager."""

    def __init__(self, count: int = 1):
        self.count = count
        # One torch thread each. Threads start at their first call, so the caller's own number stays what it is.
        self.pool = ThreadPoolExecutor(count, "lane", lambda: torch.set_num_threads(1)) if count > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def backward(
        self, losses: Iterable[Losses], share: float, parameters: Sequence[torch.nn.Parameter]
    ) -> list[torch.Tensor]:
        """Add to ``parameters`` the gradients of all ``losses``' sum times ``share``; the losses, detached, in order.

        The sums are taken in the order given, so they do not depend on which thread is done first.
        """
        if self.pool is None:
            return [_backward(one, share) for one in losses]
        told: list[torch.Tensor] = []
        waiting = list(losses)
        while waiting:  # no more at a time than there are lanes: each holds all gradients
            now, waiting = waiting[: self.count], waiting[self.count :]
            for values, gradients in self.pool.map(lambda one: _gradients(one, share, parameters), now):
                told.append(values)
                _add(parameters, gradients)
        return told


def lanes_for(parameters: Iterable[torch.Tensor], threads: int) -> int:
    """How many lanes a CPU worker of ``threads`` threads has for a model of such ``parameters``."""
    return threads if sum(p.nbytes for p in parameters) <= LANE_BYTES else 1


def _backward(losses: Losses, share: float) -> torch.Tensor:
    values = losses()
    (values.sum() * share).backward()
    return values.detach()


def _gradients(
    losses: Losses, share: float, parameters: Sequence[torch.nn.Parameter]
) -> tuple[torch.Tensor, Gradients]:
    """Of one lane alone: several backward() at once would add to the same gradients unguarded."""
    values = losses()
    return values.detach(), torch.autograd.grad(values.sum() * share, parameters, allow_unused=True)


@torch.no_grad()
def _add(parameters: Sequence[torch.nn.Parameter], gradients: Gradients) -> None:
    """To what the parameters have, in their memory order, as backward() would: the optimizer reads both as one."""
    found = [(p, gradient) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    held = [(p.grad, gradient) for p, gradient in found if p.grad is not None]
    if held:
        torch._foreach_add_([grad for grad, _ in held], [gradient for _, gradient in held])
    for p, gradient in found:
        if p.grad is None:
            p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)
