"""The one loop that trains every member of the family: AdamW, warm-up and cosine, EMA, resume from a checkpoint.

The batch of step ``i`` is a function of ``i``, so that a run that was killed goes on as if it had not been. This is
for pretraining the shipped family; fine-tuning an edit model is ``ip2p.training``'s.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Schedule:
    """``steps`` of ``batch`` drawings; ``learning_rate`` rises over ``warmup`` steps, then falls as a cosine to 0."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    checkpoint_every_s: float = 60.0

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def fit(
    name: str,
    folder: Path,
    module: M,
    loss_of: Callable[[int], torch.Tensor],
    schedule: Schedule,
    log: Callable[[str], None] = print,
) -> M:
    """Train ``module`` to ``schedule.steps`` and return its moving average, going on from ``folder/name.pt`` if there.

    Without a checkpoint ``module`` itself is the start: new, or holding weights of an earlier training.

    ``loss_of(step)`` builds its own batch from the step's number and returns a scalar. Parameters that do not require
    a gradient are left alone.
    """
    average = copy.deepcopy(module).requires_grad_(False).eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    path = folder / f"{name}.pt"
    first = _resume(path, module, average, optimizer)
    module.train()
    meter = _Meter(name, first, schedule, log)
    saved = time.monotonic()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _follow(average, module, min(schedule.ema_decay, (1 + step) / (10 + step)))
        meter.tell(step, loss.item())
        if time.monotonic() - saved > schedule.checkpoint_every_s or step + 1 == schedule.steps:
            _save(path, step + 1, module, average, optimizer)
            saved = time.monotonic()
    return average


def _resume(path: Path, module: torch.nn.Module, average: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    average.load_state_dict(state["average"])
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save_start(path: Path, module: torch.nn.Module) -> None:
    """Write weights of an earlier training as the checkpoint of step 0, without an optimizer's memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    torch.save({"step": 0, "module": state, "average": state, "optimizer": None}, path)


def _save(
    path: Path, step: int, module: torch.nn.Module, average: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "step": step, "module": module.state_dict(), "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    torch.save(state, partial)
    os.replace(partial, path)  # noqa: PTH105


@torch.no_grad()
def _follow(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    targets: list[torch.Tensor] = list(average.parameters())
    sources = module.parameters()
    torch._foreach_lerp_(targets, [p.detach() for p in sources], 1.0 - decay)
    for target, source in zip(average.buffers(), module.buffers(), strict=True):
        target.copy_(source)


class _Meter:
    """One line every twenty seconds: step, loss (mean since the last line), drawings a second, time left."""

    def __init__(self, name: str, first: int, schedule: Schedule, log: Callable[[str], None]):
        self.name, self.schedule, self.log = name, schedule, log
        self.losses: list[float] = []
        self.since, self.at = first, time.monotonic()

    def tell(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        passed = time.monotonic() - self.at
        if passed < 20 and step + 1 < self.schedule.steps:
            return
        rate = (step + 1 - self.since) / max(passed, 1e-9)
        left = (self.schedule.steps - step - 1) / max(rate, 1e-9)
        mean = sum(self.losses) / len(self.losses)
        self.log(
            f"{self.name}: step {step + 1}/{self.schedule.steps}  loss {mean:.4f}  "
            f"{rate * self.schedule.batch:.0f}/s  ETA {left / 60:.1f} min"
        )
        self.losses.clear()
        self.since, self.at = step + 1, time.monotonic()
