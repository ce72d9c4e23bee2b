"""Muon moves matrices by what is nearly orthogonal and the rest as AdamW does; a run taken up again ends the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ip2p.errors import RecipeError
from ip2p.storage import LocalFolder
from ip2p.training import muon
from ip2p.training.checkpoints import latest_whole
from ip2p.training.loop import train
from ip2p.training.loss import NoiseSchedule
from ip2p.training.muon import BUFFER, STEP_OF_ADAMW, Muon, is_matrix, orthogonal
from ip2p.training.recipe import TrainingRecipe, load_training_recipe
from ip2p.training.state import as_checkpoint, restore, start_training

RATE, DECAY = 1e-2, 0.1


@pytest.fixture
def muon_recipe(recipe: TrainingRecipe) -> TrainingRecipe:
    return dataclasses.replace(recipe, optimizer="muon")


def weights(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "conv_in.weight": (8, 4, 3, 3), "wide": (8, 24), "tall": (24, 8), "also_wide": (8, 24), "filter": (8, 6, 3, 3),
        "narrowing": (16, 6, 1, 1), "bias": (24,),
    }  # fmt: skip
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def stepped(parameters: dict[str, torch.nn.Parameter], optimizer: object, steps: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    for _ in range(steps):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    given = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(given, full_matrices=False)
    turned = u.mT @ orthogonal(given) @ vh.mT  # what is made of each singular value
    values = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.5
    assert values.max() < 1.25


def test_no_gradient_at_all_moves_nothing():
    assert torch.equal(orthogonal(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_a_first_step_is_as_long_as_adamws_and_along_the_gradient():
    before, parameters = weights(), weights()
    after = stepped(parameters, Muon(parameters, RATE, weight_decay=0.0), steps=1)
    draw = torch.Generator().manual_seed(9)
    for name, p in before.items():
        gradient, moved = torch.randn(p.shape, generator=draw), after[name] - p.detach()
        if is_matrix(name, p):
            # An orthogonal matrix (a, b) of singular values s has a root mean square of s / sqrt(max(a, b)).
            assert 0.5 < float(moved.square().mean().sqrt()) / (RATE * STEP_OF_ADAMW) < 1.25, name
            assert float((moved * gradient).sum()) < 0, name


def test_what_is_no_matrix_moves_as_by_adamw():
    ours, theirs = weights(), weights()
    moved = stepped(ours, Muon(ours, RATE, DECAY))
    expected = stepped(theirs, torch.optim.AdamW(theirs.values(), lr=RATE, weight_decay=DECAY, fused=True))
    for name in ("conv_in.weight", "bias"):
        assert torch.equal(moved[name], expected[name])
    for name in ("wide", "tall", "filter", "narrowing"):
        assert not torch.allclose(moved[name], expected[name], rtol=1e-3)


def test_weight_decay_shrinks_matrices_too():
    with_decay, without = weights(), weights()
    start = {name: p.detach().clone() for name, p in with_decay.items()}
    shrunk = stepped(with_decay, Muon(with_decay, RATE, DECAY), steps=1)
    plain = stepped(without, Muon(without, RATE, weight_decay=0.0), steps=1)
    torch.testing.assert_close(plain["wide"] - shrunk["wide"], RATE * DECAY * start["wide"], rtol=1e-3, atol=1e-6)


def test_steps_are_those_of_torchs_own_on_plain_matrices():
    """Which computes in bfloat16, so about a hundredth is between them."""
    names = ("wide", "tall", "also_wide")
    ours, theirs = ({name: weights()[name] for name in names} for _ in range(2))
    moved = stepped(ours, Muon(ours | {"bias": weights()["bias"]}, RATE, DECAY))
    torchs = torch.optim.Muon(theirs.values(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    expected = stepped(theirs, torchs)
    for name in names:
        start = weights()[name].detach()
        apart = (moved[name] - expected[name]).norm() / (expected[name] - start).norm()
        assert float(apart) < 0.03, name


def test_momentum_carries_on():
    """After the same last gradient, another past leaves another step."""
    one, two = weights(), weights()
    first, second = Muon(one, RATE, 0.0), Muon(two, RATE, 0.0)
    for p, q in zip(one.values(), two.values(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.linspace(-1, 1, q.numel()).view_as(q)
    first.step()
    second.step()
    start = [{name: p.detach().clone() for name, p in held.items()} for held in (one, two)]
    moved = [stepped(one, first, 1)["wide"] - start[0]["wide"], stepped(two, second, 1)["wide"] - start[1]["wide"]]
    assert not torch.allclose(*moved, rtol=1e-2)


def test_stacks_of_one_move_the_same(monkeypatch):
    together, alone = weights(), weights()
    expected = stepped(together, Muon(together, RATE, DECAY))
    monkeypatch.setattr(muon, "STACK_BYTES", 1)
    found = stepped(alone, Muon(alone, RATE, DECAY))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_gradients_are_forgotten_and_weights_without_one_stay():
    parameters = weights()
    optimizer = Muon(parameters, RATE, DECAY)
    stepped(parameters, optimizer, 1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters.values())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_a_unet_has_momenta_of_matrices_and_moments_of_the_rest(
    new_unet, muon_recipe: TrainingRecipe, random_rows, schedule: NoiseSchedule
) -> None:
    state = start_training(new_unet(), muon_recipe)
    train(state, random_rows, schedule, until=1)
    kinds = {name: set(state.optimizer.state[p]) for name, p in state.parameters.items()}
    assert kinds["conv_in.weight"] == kinds["conv_out.weight"] == {"exp_avg", "exp_avg_sq", "step"}
    matrices = {name for name, held in kinds.items() if held == {BUFFER}}
    assert matrices == {name for name, p in state.parameters.items() if p.ndim >= 2} - {
        "conv_in.weight", "conv_out.weight",
    }  # fmt: skip
    assert len(matrices) > 20


def test_a_run_taken_up_again_ends_with_the_same_bits(
    new_unet, muon_recipe: TrainingRecipe, new_rows, schedule: NoiseSchedule, tmp_path: Path
) -> None:
    whole = start_training(new_unet(), muon_recipe)
    train(whole, new_rows(), schedule)
    folder = LocalFolder(tmp_path)
    train(start_training(new_unet(), muon_recipe), new_rows(), schedule, checkpoints=folder, about={}, until=3)
    again = start_training(new_unet(seed=3), muon_recipe)
    restore(again, latest_whole(folder), {})
    train(again, new_rows(), schedule)
    for name, p in whole.parameters.items():
        assert torch.equal(again.parameters[name], p), name
        assert torch.equal(again.ema.averages[name], whole.ema.averages[name]), name


def test_it_learns(new_unet, muon_recipe: TrainingRecipe, recipe: TrainingRecipe, new_rows, schedule) -> None:
    """The weights it ends with are neither those of the start nor AdamW's."""
    states = [start_training(new_unet(), one) for one in (muon_recipe, recipe)]
    start = {name: p.detach().clone() for name, p in states[0].parameters.items()}
    for state in states:
        train(state, new_rows(), schedule)
    for name in ("mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"):
        ours, theirs = (state.parameters[name] for state in states)
        assert not torch.allclose(ours, start[name], rtol=1e-4)
        assert not torch.allclose(ours, theirs, rtol=1e-4)


def test_a_checkpoint_from_before_there_was_a_choice_goes_on(new_unet, undisturbed, recipe: TrainingRecipe) -> None:
    checkpoint = as_checkpoint(undisturbed, {})
    del checkpoint.state["recipe"]["optimizer"]
    state = start_training(new_unet(), recipe)
    restore(state, checkpoint, {})
    assert state.step == 6


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(RecipeError, match="optimizer is adamw or muon"):
        load_training_recipe("postcard", ["optimizer=sgd"])
