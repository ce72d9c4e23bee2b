"""A real group of two processes, each with a part of the weights, against one process with all of them."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_family import tiny_unet

from ip2p.errors import InputError
from ip2p.storage import open_folder
from ip2p.training.checkpoints import Checkpoint, latest_whole
from ip2p.training.loop import train
from ip2p.training.loss import NoiseSchedule
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.sharding import check_shards
from ip2p.training.state import TrainingState, restore, start_training

WORLD = 2


def work(rank: int, folder: str, recipe: TrainingRecipe, rows: typing.Any, schedule: NoiseSchedule) -> None:
    """One worker of two: go on from the last checkpoint in ``folder``, if any, to the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{recipe.steps}", rank=rank, world_size=WORLD)
    try:
        state = start_training(tiny_unet(), recipe, shard_on="cpu")
        checkpoints = open_folder(f"{folder}/checkpoints")
        found = latest_whole(checkpoints)
        if found is not None:
            restore(state, found, {})
        held = sum(p.to_local().numel() for p in state.parameters.values())  # type: ignore[attr-defined]
        full = sum(p.numel() for p in state.parameters.values())
        Path(folder, f"share-{rank}").write_text(str(held / full))
        look = functools.partial(look_at_averages, state)
        train(state, rows, schedule, checkpoints=checkpoints, rank=rank, world=WORLD, report=look, report_every=1)
    finally:
        dist.destroy_process_group()


def look_at_averages(state: TrainingState, told: dict[str, typing.Any]) -> None:
    """A forward without backward, as a look at held-out pairs is."""
    with torch.no_grad(), state.ema.in_place_of(state.parameters):
        state.unet(torch.zeros(1, 8, 8, 8), torch.tensor([5]), encoder_hidden_states=torch.zeros(1, 5, 32))


def in_two_processes(folder: Path, recipe: TrainingRecipe, rows: typing.Any, schedule: NoiseSchedule) -> Checkpoint:
    torch.multiprocessing.spawn(work, (str(folder), recipe, rows, schedule), nprocs=WORLD)
    found = latest_whole(open_folder(f"{folder}/checkpoints"))
    assert found is not None
    return found


def in_one(folder: Path, recipe: TrainingRecipe, rows: typing.Any, schedule: NoiseSchedule) -> Checkpoint:
    state = start_training(tiny_unet(), recipe)
    checkpoints = open_folder(f"{folder}/checkpoints")
    found = latest_whole(checkpoints)
    if found is not None:
        restore(state, found, {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: the same order of sums as far as it can be
    train(state, rows, schedule, checkpoints=checkpoints)
    torch.set_num_threads(threads)
    found = latest_whole(checkpoints)
    assert found is not None
    return found


def assert_close(one: Checkpoint, other: Checkpoint) -> None:
    """Group by group, in all numbers together: where a gradient is about zero, Adam makes a step of a rounding."""
    assert one.step == other.step
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        ours, theirs = (
            torch.cat([held[name].flatten() for name in tensors]) for held in (tensors, other.tensors[group])
        )
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-3, group


@pytest.fixture
def few_steps(recipe: TrainingRecipe) -> TrainingRecipe:
    """An average far from the weights, steps that show, and gradients that clipping does shorten."""
    return dataclasses.replace(recipe, ema_decay=0.9, max_grad_norm=0.05, steps=4, learning_rate=1e-2)


def test_two_shards_train_as_one_whole_and_each_holds_half(
    few_steps: TrainingRecipe, random_rows: typing.Any, schedule: NoiseSchedule, tmp_path: Path
) -> None:
    sharded = in_two_processes(tmp_path, few_steps, random_rows, schedule)
    assert_close(sharded, in_one(tmp_path / "one", few_steps, random_rows, schedule))
    shares = [float((tmp_path / f"share-{rank}").read_text()) for rank in range(WORLD)]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.6


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_run_goes_on_sharded_or_whole_whatever_it_was(
    few_steps: TrainingRecipe, random_rows: typing.Any, schedule: NoiseSchedule, tmp_path: Path, sharded_first: bool
) -> None:
    undisturbed = in_one(tmp_path / "undisturbed", few_steps, random_rows, schedule)
    half = dataclasses.replace(few_steps, steps=2)
    kinds: list[Callable[..., Checkpoint]] = [in_two_processes, in_one] if sharded_first else [in_one, in_two_processes]
    kinds[0](tmp_path, half, random_rows, schedule)
    assert_close(kinds[1](tmp_path, few_steps, random_rows, schedule), undisturbed)


def test_a_batch_that_workers_cannot_share_equally_is_refused() -> None:
    check_shards(12, (1, 4))
    with pytest.raises(InputError, match=r"global_batch=12 is no multiple of 5 workers"):
        check_shards(12, (4, 6))
