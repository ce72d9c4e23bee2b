"""The training loop: read ahead, step, tell, save. What a step does is all in ``train_step``.

One process runs it for itself, or several run it side by side, each with its ``rank``, and average their gradients. It
knows no launcher and no tracker: a job passes ``average``, ``report`` and the folder for checkpoints.
"""

from __future__ import annotations

import collections
import functools
import math
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ip2p.errors import InputError, TrainingError
from ip2p.storage import Folder
from ip2p.training.checkpoints import save_checkpoint
from ip2p.training.conditioning_dropout import drop_conditions
from ip2p.training.draws import Draws, draw
from ip2p.training.held_out import BANDS, band_of
from ip2p.training.lanes import Lanes
from ip2p.training.learning_rate import learning_rate_at
from ip2p.training.loss import NoiseSchedule, autocast, image_latents, sample_losses, target_latents
from ip2p.training.order import Order
from ip2p.training.pair_columns import PairColumns, PairSource
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.sharding import local
from ip2p.training.state import TrainingState, as_checkpoint

Average = Callable[[Sequence[torch.Tensor]], None]
"""Replaces each gradient by its mean over all workers, in place (``averaging.mean_over_workers``)."""

T = typing.TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the UNet in one call; columns and draws lie on the UNet's device."""

    columns: PairColumns
    draws: Draws
    null_state: torch.Tensor  # (T, D)


@dataclass(frozen=True)
class StepResult:
    """Of one worker's samples, on the device: nobody waits for it before it is looked at."""

    losses: torch.Tensor  # (n,)
    timesteps: torch.Tensor  # (n,)
    grad_norm: torch.Tensor  # scalar, over all workers and before clipping


def micro_batches(
    source: PairSource, order: Order, recipe: TrainingRecipe, step: int, rank: int = 0, world: int = 1, lanes: int = 1
) -> list[MicroBatch]:
    """Worker ``rank``'s share of global batch ``step``, in pieces of at most ``recipe.micro_batch``, enough for all
    ``lanes``.
    """
    places, indices = order.rows_of(step, rank, world)
    device = source.null_state.device
    size = max(1, min(recipe.micro_batch, math.ceil(len(places) / lanes)))
    batches = []
    for first in range(0, len(places), size):
        chunk = slice(first, first + size)
        draws = draw(recipe.seed, step, places[chunk], source.latent_shape, recipe.flip)
        columns = source.rows(indices[chunk], draws.flips.numpy())
        batches.append(MicroBatch(columns, draws.to(device), source.null_state))
    return batches


def train_step(
    state: TrainingState,
    batches: Sequence[MicroBatch],
    schedule: NoiseSchedule,
    average: Average | None = None,
    world: int = 1,
    lanes: Lanes | None = None,
) -> StepResult:
    """One optimizer step on one worker's ``batches``; weights, average and ``state.step`` move together."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.step, state.recipe)
    state.optimizer.zero_grad(set_to_none=True)
    parameters = list(state.parameters.values())
    # Divided by the global batch, not by this worker's: shares of unequal size then still add up to its mean.
    share = world / state.recipe.global_batch
    losses = (lanes or Lanes()).backward(
        (functools.partial(batch_losses, state, batch, schedule) for batch in batches), share, parameters
    )
    timesteps = [batch.draws.timesteps for batch in batches]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if average is not None:
        average(gradients)
    norm = clip(gradients, state.recipe.max_grad_norm)
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.parameters, state.step)
    return StepResult(torch.cat(losses), torch.cat(timesteps), norm)


def batch_losses(state: TrainingState, batch: MicroBatch, schedule: NoiseSchedule) -> torch.Tensor:
    """The loss of each sample with its conditions dropped as drawn, ``(n,)``."""
    draws = batch.draws
    clean = target_latents(batch.columns, draws.posterior_noise, schedule)
    image = image_latents(batch.columns, schedule)
    texts, image = drop_conditions(
        batch.columns.text_states, image, batch.null_state, draws.dropout, state.recipe.dropout_rate
    )
    with autocast(state.recipe.precision, clean.device):
        return sample_losses(state.forward, clean, image, texts, draws.noise, draws.timesteps, schedule)


def clip(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale ``gradients`` in place to a total norm of at most ``max_norm`` (0 = leave them); the norm they had."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local(gradients), scale)
    return norm


def train(
    state: TrainingState,
    source: PairSource,
    schedule: NoiseSchedule,
    *,
    checkpoints: Folder | None = None,
    about: Mapping[str, str] | None = None,
    report: Callable[[dict[str, typing.Any]], None] = lambda told: None,
    report_every: int = 50,
    report_also_every: int = 0,
    average: Average | None = None,
    rank: int = 0,
    world: int = 1,
    lanes: int = 1,
    until: int | None = None,
) -> None:
    """Train from ``state.step`` to ``until`` (default: the recipe's last step).

    ``report`` gets a dict every ``report_every`` steps (and every ``report_also_every``, unless that is 0) and before
    each checkpoint; worker 0 saves. ``source`` is read in a thread of its own, one step ahead; on a CPU, ``lanes``
    micro-batches go through the UNet side by side. Raises InputError for a state that is past the recipe's last step,
    TrainingError where loss or gradients are not finite, before anything of that is saved.
    """
    recipe = state.recipe
    if state.step > recipe.steps:
        raise InputError(
            f"the training is at step {state.step} already, past steps={recipe.steps}; `--set steps={state.step}` or "
            "more, or name another folder to start anew"
        )
    last = recipe.steps if until is None else min(until, recipe.steps)
    order = Order(len(source), recipe.global_batch, recipe.seed)
    meter = Meter(state.step, recipe)
    steps = range(state.step, last)
    make = functools.partial(micro_batches, source, order, recipe, rank=rank, world=world, lanes=lanes)
    with Lanes(lanes) as side_by_side:
        for batches in ahead(make, steps):
            meter.add(train_step(state, batches, schedule, average, world, side_by_side))
            saving = state.step % recipe.checkpoint_every == 0 or state.step == last
            if saving or any(every and state.step % every == 0 for every in (report_every, report_also_every)):
                report(meter.read(state.step))
            if saving and checkpoints is not None:
                checkpoint = as_checkpoint(state, about or {})
                if rank == 0:
                    save_checkpoint(checkpoints, checkpoint, recipe.keep_checkpoints)


def ahead(make: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    """``make(step)`` of each step in order, the next one being made while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        waiting: collections.deque[Future[T]] = collections.deque()
        try:
            for step in steps:
                waiting.append(thread.submit(make, step))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            if waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


class Meter:
    """Gathers results on the device and reads them all at once, so that a step waits for nothing."""

    def __init__(self, step: int, recipe: TrainingRecipe):
        self.recipe, self.step, self.at = recipe, step, time.monotonic()
        self.results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    def read(self, step: int) -> dict[str, typing.Any]:
        """Means since the last reading: step, loss, loss_by_band, grad_norm, learning_rate, samples_per_s, eta_s.

        ``loss_by_band`` has NaN for a band without samples; ``samples_by_band`` says how many this worker had. Raises
        TrainingError at the first step that is not finite.
        """
        norms = torch.stack([result.grad_norm for result in self.results]).cpu().numpy()
        losses = torch.cat([result.losses for result in self.results]).cpu().numpy()
        timesteps = torch.cat([result.timesteps for result in self.results]).cpu().numpy()
        self._check_finite(norms)
        passed = max(time.monotonic() - self.at, 1e-9)
        rate = (step - self.step) / passed
        self.results, self.step, self.at = [], step, time.monotonic()
        return {
            "step": step,
            "loss": float(losses.mean()),
            "loss_by_band": mean_by_band(losses, timesteps).tolist(),
            "samples_by_band": np.bincount(band_of(timesteps), minlength=BANDS).tolist(),
            "grad_norm": float(norms.mean()),
            "learning_rate": learning_rate_at(step - 1, self.recipe),
            "samples_per_s": rate * self.recipe.global_batch,
            "eta_s": (self.recipe.steps - step) / rate,
        }

    def _check_finite(self, norms: np.ndarray) -> None:
        # A loss that is no number makes the norm none either, and the norm is known to all workers.
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            raise TrainingError(
                f"step {self.step + int(bad[0]) + 1}: loss or gradient is not a finite number; nothing was saved from "
                "there on. Go on from the last checkpoint with a lower learning_rate, or `--set precision=float32`"
            )


def mean_by_band(losses: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Mean loss of each band of timesteps, ``(BANDS,)``; NaN where there is no sample."""
    bands = band_of(timesteps)
    counts = np.bincount(bands, minlength=BANDS)
    sums = np.bincount(bands, weights=losses, minlength=BANDS)
    return np.divide(sums, counts, out=np.full(BANDS, np.nan), where=counts > 0)
