"""Whole runs of the tiny UNet: resumed ones, shared ones, failing ones, and one that learns."""

from __future__ import annotations

import dataclasses
import errno
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.errors import CheckpointError, InputError, StorageError, TrainingError
from ip2p.storage import LocalFolder
from ip2p.training import loop
from ip2p.training.checkpoints import finished_steps, latest_whole
from ip2p.training.latent_cache import CachedRows, cache_identity
from ip2p.training.loop import MicroBatch, ahead, batch_losses, clip, mean_by_band, micro_batches, train, train_step
from ip2p.training.loss import NoiseSchedule
from ip2p.training.order import Order
from ip2p.training.pair_columns import PictureRows
from ip2p.training.pair_index import list_pairs
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.state import TrainingState, as_checkpoint, restore, start_training
from tests.tiny_pairs import make_cache

NewUnet = Callable[..., typing.Any]
ABOUT = {"base": "sha-of-base", "pairs": "sha-of-pairs"}


def everything(state: TrainingState) -> dict[str, torch.Tensor]:
    """Weights, average and moments, by a name of their own."""
    found = {f"unet.{name}": p.detach() for name, p in state.unet.named_parameters()}
    found |= {f"ema.{name}": average for name, average in state.ema.averages.items()}
    for name, parameter in state.unet.named_parameters():
        found |= {f"{moment}.{name}": value for moment, value in state.optimizer.state[parameter].items()}
    return found


def assert_equal(one: TrainingState, two: TrainingState) -> None:
    first, second = everything(one), everything(two)
    assert one.step == two.step
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing == []


def assert_close(one: TrainingState, two: TrainingState, new_unet: NewUnet) -> None:
    """Nothing differs by 1e-4, and all weights together by less than 1 % of the way that they went."""
    first, second = everything(one), everything(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    start = start_training(new_unet(), one.recipe).parameters
    moved, apart = (
        torch.cat([(one.parameters[name] - other[name]).detach().flatten() for name in start]).norm()
        for other in (start, two.parameters)
    )
    assert apart < 0.01 * moved


class Killed(BaseException):
    """Ends a run in the middle of a step, as a signal would."""


def killed_in(step: int) -> Callable[..., None]:
    calls = 0

    def average(gradients: typing.Sequence[torch.Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed

    return average


@pytest.mark.parametrize("killed_at", [2, 3, 5, 6])
def test_a_killed_run_that_is_resumed_ends_with_the_same_bits(
    undisturbed: TrainingState, new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule,
    tmp_path: Path, killed_at: int,
) -> None:  # fmt: skip
    folder = LocalFolder(tmp_path)
    with pytest.raises(Killed):
        train(
            start_training(new_unet(), recipe), random_rows, schedule,
            checkpoints=folder, about=ABOUT, average=killed_in(killed_at),
        )  # fmt: skip
    again = start_training(new_unet(), recipe)
    if found := latest_whole(folder):
        restore(again, found, ABOUT)
    assert again.step == (killed_at - 1) // 2 * 2
    train(again, random_rows, schedule, checkpoints=folder, about=ABOUT)
    assert_equal(again, undisturbed)
    assert finished_steps(folder) == [4, 6]


def test_the_whole_of_a_state_is_saved_and_restored(
    undisturbed: TrainingState, new_unet: NewUnet, recipe: TrainingRecipe
) -> None:
    other = start_training(new_unet(seed=3), recipe)
    other.unet.to(memory_format=torch.channels_last)
    restore(other, as_checkpoint(undisturbed, ABOUT), ABOUT)
    assert_equal(other, undisturbed)
    assert other.step == 6
    moments = [state["exp_avg"] for state in other.optimizer.state.values()]
    assert len(moments) == len(list(other.unet.parameters()))
    for parameter, state in other.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
        state["step"] += 1
    assert {float(state["step"]) for state in undisturbed.optimizer.state.values()} == {6.0}


def shares(
    state: TrainingState, source: typing.Any, schedule: NoiseSchedule, step: int, world: int
) -> Iterator[list[torch.Tensor]]:
    """The gradients that each of ``world`` workers brings to the average of ``step``."""
    order = Order(len(source), state.recipe.global_batch, state.recipe.seed)
    for rank in range(world):
        state.optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches(source, order, state.recipe, step, rank, world):
            (batch_losses(state, batch, schedule).sum() * (world / state.recipe.global_batch)).backward()
        yield [typing.cast(torch.Tensor, p.grad).clone() for p in state.parameters.values()]


@pytest.mark.parametrize("world", [2, 3])
def test_workers_that_average_their_gradients_end_where_one_worker_does(
    undisturbed: TrainingState, new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule,
    world: int,
) -> None:  # fmt: skip
    """Three workers have 3, 3 and 2 samples of a global batch of 8. The other workers' part of a step is simulated."""
    state, shadow = start_training(new_unet(), recipe), start_training(new_unet(), recipe)

    def average(gradients: typing.Sequence[torch.Tensor]) -> None:
        of_all = list(shares(shadow, random_rows, schedule, state.step, world))
        for own, others in zip(gradients, zip(*of_all, strict=True), strict=True):
            assert torch.allclose(own, others[0], atol=1e-6)
            own.copy_(torch.stack(others).mean(dim=0))

    order = Order(len(random_rows), recipe.global_batch, recipe.seed)
    for step in range(recipe.steps):
        for name, p in state.parameters.items():
            shadow.parameters[name].data.copy_(p.data)
        train_step(state, micro_batches(random_rows, order, recipe, step, 0, world), schedule, average, world)
    assert_close(undisturbed, state, new_unet)


def test_the_size_of_micro_batches_moves_no_more_than_last_bits(
    undisturbed: TrainingState, new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    state = start_training(new_unet(), dataclasses.replace(recipe, micro_batch=3))
    train(state, random_rows, schedule)
    assert_close(undisturbed, state, new_unet)


def test_the_first_step_starts_from_the_loss_of_the_base(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    state, base = start_training(new_unet(), recipe), new_unet()
    batch = micro_batches(random_rows, Order(12, 8, 7), recipe, 0)[0]
    wide = batch_losses(state, batch, schedule)
    # The base sees the noisy half of what the wider UNet is shown.
    state.forward = lambda sample, timesteps, text: base(sample[:, :4].contiguous(), timesteps, text)
    with torch.no_grad():
        assert torch.allclose(batch_losses(state, batch, schedule), wide, atol=1e-6)


def test_dropped_conditions_reach_the_unet(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    state = start_training(new_unet(), recipe)
    batch = micro_batches(random_rows, Order(12, 8, 7), recipe, 0)[0]
    drawn = torch.tensor([0.01, 0.06, 0.11, 0.5], dtype=torch.float64)
    batch = MicroBatch(batch.columns, dataclasses.replace(batch.draws, dropout=drawn), batch.null_state)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(sample: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> typing.Any:
        seen.append((sample, text))
        return state.unet(sample, timesteps, text)

    state.forward = forward
    batch_losses(state, batch, schedule)
    sample, text = seen[0]
    assert [bool(row.any()) for row in sample[:, 4:]] == [True, False, False, True]
    assert [torch.equal(row, batch.null_state) for row in text] == [True, True, False, False]


def test_pairs_are_learned_and_the_average_follows(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    """Four pairs without dropout and flips: the loss falls by more than half, that of the average too."""
    random_rows.states = random_rows.states[:4]
    learning = dataclasses.replace(
        recipe, steps=40, learning_rate=5e-3, dropout_rate=0.0, flip=0.0, micro_batch=8, ema_decay=0.8
    )
    schedule = dataclasses.replace(schedule, prediction_type="epsilon")
    state = start_training(new_unet(), learning)
    looks = [batch for step in (1000, 1001) for batch in micro_batches(random_rows, Order(4, 8, 7), learning, step)]

    @torch.no_grad()
    def loss() -> float:
        return float(torch.cat([batch_losses(state, batch, schedule) for batch in looks]).mean())

    before = loss()
    train(state, random_rows, schedule)
    assert loss() < 0.5 * before
    with state.ema.in_place_of(state.parameters):
        assert loss() < 0.5 * before
    assert state.unet.conv_in.weight[:, 4:].any()


def test_reports_tell_step_loss_bands_and_pace(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    told: list[dict[str, typing.Any]] = []
    train(start_training(new_unet(), recipe), random_rows, schedule, report=told.append, report_every=3)
    assert [report["step"] for report in told] == [2, 3, 4, 6]
    first = told[0]
    assert first["learning_rate"] == pytest.approx(1e-4)
    assert first["loss"] > 0
    assert first["grad_norm"] > 0
    assert np.nanmean(first["loss_by_band"]) == pytest.approx(first["loss"], rel=0.5)
    assert first["eta_s"] == pytest.approx(4 * 8 / first["samples_per_s"], rel=1e-6)
    assert told[-1]["eta_s"] == 0


def test_reports_come_at_the_multiples_of_two_numbers_and_at_checkpoints(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    told: list[int] = []
    state = start_training(new_unet(), dataclasses.replace(recipe, steps=12, checkpoint_every=7))
    train(
        state, random_rows, schedule, report=lambda row: told.append(row["step"]), report_every=5, report_also_every=4
    )
    assert told == [4, 5, 7, 8, 10, 12]


def test_a_state_past_the_last_step_is_refused(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    state = start_training(new_unet(), recipe)
    state.step = 9
    with pytest.raises(InputError, match=r"at step 9 already, past steps=6; `--set steps=9`"):
        train(state, random_rows, schedule)


def test_losses_fall_into_their_bands() -> None:
    means = mean_by_band(np.array([1.0, 3.0, 5.0]), np.array([0, 99, 950]))
    assert means[[0, 9]].tolist() == [2.0, 5.0]
    assert np.isnan(means[1:9]).all()


def test_the_recipe_s_rate_clipping_and_decay_are_what_a_step_uses(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    state = start_training(new_unet(), dataclasses.replace(recipe, warmup=4))
    batches = micro_batches(random_rows, Order(12, 8, 7), recipe, 0)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    result = train_step(state, batches, schedule)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-5)
    gradients = [typing.cast(torch.Tensor, p.grad) for p in state.parameters.values()]
    assert float(result.grad_norm) > 1.0
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1.0, rel=1e-3)
    name = "conv_out.bias"
    moved = before[name] + (state.parameters[name].detach() - before[name]) * (1 - 2 / 11)
    assert torch.allclose(state.ema.averages[name], moved, atol=1e-7)
    assert result.losses.shape == result.timesteps.shape == (8,)


def test_clipping_leaves_small_gradients_and_can_be_switched_off() -> None:
    small, large = [torch.tensor([0.3, 0.4])], [torch.tensor([30.0, 40.0])]
    assert float(clip(small, 1.0)) == pytest.approx(0.5)
    assert small[0].tolist() == pytest.approx([0.3, 0.4])
    assert float(clip(large, 0.0)) == pytest.approx(50.0)
    assert large[0].tolist() == [30.0, 40.0]


@pytest.mark.parametrize("report_every", [1, 50])
def test_a_loss_that_is_no_number_names_its_step_and_leaves_the_last_checkpoint(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, report_every: int,
) -> None:  # fmt: skip
    folder, state = LocalFolder(tmp_path), start_training(new_unet(), recipe)
    honest = loop.sample_losses
    monkeypatch.setattr(
        loop, "sample_losses", lambda *given: honest(*given) * (float("nan") if state.step == 2 else 1.0)
    )
    with pytest.raises(TrainingError, match=r"step 3: .*not a finite number.*lower learning_rate.*precision=float32"):
        train(state, random_rows, schedule, checkpoints=folder, about=ABOUT, report_every=report_every)
    found = latest_whole(folder)
    assert found is not None
    assert found.step == 2
    assert all(bool(tensor.isfinite().all()) for group in found.tensors.values() for tensor in group.values())


def test_a_disk_that_fills_up_ends_the_run_with_the_checkpoint_before(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, state = LocalFolder(tmp_path), start_training(new_unet(), recipe)

    def fsync(handle: int) -> None:
        if state.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match=r"step-00000004/.*the disk is full"):
        train(state, random_rows, schedule, checkpoints=folder, about=ABOUT)
    found = latest_whole(folder)
    assert found is not None
    assert found.step == 2


def test_only_worker_0_saves(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule, tmp_path: Path
) -> None:
    folder = LocalFolder(tmp_path)
    train(start_training(new_unet(), recipe), random_rows, schedule, checkpoints=folder, rank=1, world=2, until=2)
    assert finished_steps(folder) == []
    train(start_training(new_unet(), recipe), random_rows, schedule, checkpoints=folder, rank=0, world=2, until=1)
    assert finished_steps(folder) == [1]


@pytest.mark.parametrize(
    ("changes", "about", "said"),
    [
        ({"dropout_rate": 0.1}, ABOUT, "dropout_rate was 0.05, is 0.1"),
        ({"seed": 8}, ABOUT, "seed was 7, is 8"),
        ({}, {**ABOUT, "pairs": "others"}, "pairs was sha-of-pairs, is others"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    new_unet: NewUnet, recipe: TrainingRecipe, changes: dict[str, typing.Any], about: dict[str, str], said: str
) -> None:
    found = as_checkpoint(start_training(new_unet(), recipe), ABOUT)
    other = start_training(new_unet(), dataclasses.replace(recipe, **changes))
    with pytest.raises(InputError, match=f"another run .*{said}.*start anew"):
        restore(other, found, about)


def test_a_run_may_go_on_for_more_steps(new_unet: NewUnet, recipe: TrainingRecipe) -> None:
    found = as_checkpoint(start_training(new_unet(), recipe), ABOUT)
    longer = dataclasses.replace(recipe, steps=9, keep_checkpoints=5, checkpoint_every=3, micro_batch=2, name="longer")
    restore(start_training(new_unet(), longer), found, ABOUT)


def test_weights_of_another_unet_are_refused(new_unet: NewUnet, recipe: TrainingRecipe) -> None:
    found = as_checkpoint(start_training(new_unet(), recipe), ABOUT)
    found.tensors["ema"] = {**found.tensors["ema"], "conv_out.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"ema of the checkpoint has other tensors .* conv_out.bias; start from"):
        restore(start_training(new_unet(), recipe), found, ABOUT)


def test_an_edit_model_is_trained_further_from_its_own_weights(new_unet: NewUnet, recipe: TrainingRecipe) -> None:
    state = start_training(new_unet(in_channels=8), recipe)
    assert torch.equal(state.unet.conv_in.weight, new_unet(in_channels=8).conv_in.weight)
    with pytest.raises(CheckpointError, match="found 9 input channels"):
        start_training(new_unet(in_channels=9), recipe)


def test_half_precision_weights_are_trained_in_float32(new_unet: NewUnet, recipe: TrainingRecipe) -> None:
    state = start_training(new_unet().half(), recipe)
    assert {p.dtype for p in state.parameters.values()} == {torch.float32}
    assert len(state.parameters) == len(list(state.unet.parameters()))


def test_gradient_checkpointing_gives_the_same_gradients(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    batches = micro_batches(random_rows, Order(12, 8, 7), recipe, 0)
    states = [start_training(new_unet(), recipe, gradient_checkpointing=switch) for switch in (False, True)]
    results = [train_step(state, batches, schedule) for state in states]
    assert torch.allclose(results[0].grad_norm, results[1].grad_norm, rtol=1e-4)
    assert [state.unet.is_gradient_checkpointing for state in states] == [False, True]


def test_bfloat16_trains_float32_weights(
    new_unet: NewUnet, recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    batches = micro_batches(random_rows, Order(12, 8, 7), recipe, 0)
    exact, coarse = (
        start_training(new_unet(), dataclasses.replace(recipe, precision=name)) for name in ("float32", "bfloat16")
    )
    one, two = train_step(exact, batches, schedule), train_step(coarse, batches, schedule)
    assert not torch.equal(one.losses, two.losses)
    assert torch.allclose(one.losses, two.losses, rtol=0.1)
    assert {p.dtype for p in coarse.parameters.values()} == {torch.float32}


def test_a_run_from_the_cache_follows_a_run_from_pictures(
    new_unet: NewUnet, recipe: TrainingRecipe, run_uri: str, model, encoder, schedule: NoiseSchedule, tmp_path: Path
) -> None:
    splits = {"train": list_pairs([run_uri])}
    identity = cache_identity(splits, model.sha256, 16, mirrored=True)
    make_cache(LocalFolder(tmp_path), identity, splits, encoder)
    sources = CachedRows(LocalFolder(tmp_path), identity), PictureRows(splits["train"], encoder, 16, threads=2)
    losses = []
    for source in sources:
        state, told = start_training(new_unet(), recipe), []
        train(state, source, schedule, report=told.append)
        losses.append([report["loss"] for report in told])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_batches_are_made_one_ahead_in_order_and_failures_arrive() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            raise ValueError("step 3 cannot be read")
        return step * 10

    batches = ahead(make, range(5))
    assert next(batches) == 0
    assert 2 not in made
    assert [next(batches), next(batches)] == [10, 20]
    with pytest.raises(ValueError, match="step 3"):
        next(batches)
    assert list(ahead(make, range(3))) == [0, 10, 20]
    assert list(ahead(make, range(0))) == []
