from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import torch

from ip2p.models.components import EditModel, TextToImage
from ip2p.training.edit_model import trained_edit_model
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.state import start_training


def test_the_model_is_given_the_averages_and_the_scales_of_the_recipe(
    new_unet: Callable[..., typing.Any], recipe: TrainingRecipe, model: TextToImage
) -> None:
    scaled = dataclasses.replace(recipe, guidance_scale=3.0, image_guidance_scale=1.2)
    base = EditModel(**{**vars(model), "unet": new_unet()})
    averages = {name: value + 1 for name, value in start_training(new_unet(), recipe).ema.averages.items()}
    made = trained_edit_model(base, averages, scaled)
    assert all(torch.equal(value, averages[name]) for name, value in made.unet.named_parameters())
    assert (made.guidance_scale, made.image_guidance_scale) == (3.0, 1.2)
