from __future__ import annotations

import copy
import dataclasses
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip2p.errors import InputError
from ip2p.models.components import EditModel, TextToImage
from ip2p.models.widening import widen
from ip2p.storage import open_folder
from ip2p.training.checkpoints import latest_whole
from ip2p.training.edit_model import trained_edit_model
from ip2p.training.loop import train
from ip2p.training.loss import NoiseSchedule
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.state import TrainingState, restore, start_training


@pytest.fixture
def lora_recipe(recipe: TrainingRecipe) -> TrainingRecipe:
    return dataclasses.replace(recipe, lora_rank=2, ema_decay=0.5)


def outputs(unet: typing.Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    sample = torch.randn((2, 8, 8, 8), generator=random)
    texts = torch.randn((2, 5, 32), generator=random)
    with torch.no_grad():
        return unet(sample, torch.tensor([10, 500]), encoder_hidden_states=texts).sample


def trained(unet: typing.Any, recipe: TrainingRecipe, rows: typing.Any, schedule: NoiseSchedule) -> TrainingState:
    state = start_training(unet, recipe)
    train(state, rows, schedule)
    return state


def test_lora_without_peft_says_how_to_get_it(
    new_unet: Callable[..., typing.Any], recipe: TrainingRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = new_unet()  # diffusers looks for peft once, when it is imported
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install peft.*--set lora_rank=0"):
        start_training(unet, dataclasses.replace(recipe, lora_rank=4))


def test_additions_change_nothing_at_first(new_unet: Callable[..., typing.Any], lora_recipe: TrainingRecipe) -> None:
    unet = new_unet()
    before = outputs(widen(copy.deepcopy(unet)))
    assert torch.equal(outputs(start_training(unet, lora_recipe).unet), before)


def test_only_additions_and_the_first_convolution_are_trained(
    new_unet: Callable[..., typing.Any], lora_recipe: TrainingRecipe, random_rows: typing.Any, schedule: NoiseSchedule
) -> None:
    unet = new_unet()
    state = start_training(unet, lora_recipe)
    trains = {name for name in state.parameters if "lora_" not in name}
    before = {name: value.detach().clone() for name, value in state.unet.named_parameters()}
    train(state, random_rows, schedule)
    moved = {name for name, value in state.unet.named_parameters() if not torch.equal(value, before[name])}
    assert trains == {"conv_in.weight", "conv_in.bias"}
    assert moved == set(state.parameters)
    assert sum(p.numel() for p in state.parameters.values()) < 0.5 * sum(p.numel() for p in unet.parameters())


def test_the_merged_model_has_the_shape_of_any_other_and_edits_as_the_averaged_additions_do(
    new_unet: Callable[..., typing.Any],
    lora_recipe: TrainingRecipe,
    random_rows: typing.Any,
    schedule: NoiseSchedule,
    model: TextToImage,
) -> None:
    state = trained(new_unet(), lora_recipe, random_rows, schedule)
    untrained = outputs(widen(new_unet()))
    with_additions = copy.deepcopy(state.unet)
    for name, value in with_additions.named_parameters():
        if name in state.ema.averages:
            value.data.copy_(state.ema.averages[name])
    expected = outputs(with_additions.eval())
    base = EditModel(**{**vars(model), "unet": new_unet()})
    merged = trained_edit_model(base, state.ema.averages, lora_recipe).unet
    assert set(merged.state_dict()) == set(widen(new_unet()).state_dict())
    torch.testing.assert_close(outputs(merged), expected, atol=1e-5, rtol=1e-4)
    assert (expected - untrained).abs().max() > 1e-4


def test_a_resumed_training_of_additions_ends_with_the_same_weights(
    new_unet: Callable[..., typing.Any],
    lora_recipe: TrainingRecipe,
    random_rows: typing.Any,
    schedule: NoiseSchedule,
    tmp_path: Path,
) -> None:
    undisturbed = trained(new_unet(), lora_recipe, random_rows, schedule)
    first = start_training(new_unet(), lora_recipe)
    train(first, random_rows, schedule, checkpoints=open_folder(str(tmp_path)), until=4)
    resumed = start_training(new_unet(), lora_recipe)
    saved = latest_whole(open_folder(str(tmp_path)))
    assert saved is not None
    restore(resumed, saved, {})
    train(resumed, random_rows, schedule)
    assert resumed.step == undisturbed.step == 6
    assert all(torch.equal(value, resumed.parameters[name]) for name, value in undisturbed.parameters.items())
