"""From a training's averaged weights to the edit model that is exported, in the shape of any other."""

from __future__ import annotations

import dataclasses
import typing

from ip2p.models.components import EditModel
from ip2p.training.checkpoints import Tensors
from ip2p.training.ema import copy_into
from ip2p.training.lora import merge_lora
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.state import start_training


def trained_edit_model(base: EditModel, averages: Tensors, recipe: TrainingRecipe) -> EditModel:
    """What a run of ``recipe`` made of ``base``, whose UNet is used up; ``averages``: the ema of its checkpoint."""
    state = start_training(base.unet, recipe)
    copy_into(state.parameters, averages)
    if recipe.lora_rank:
        merge_lora(state.unet)
    return with_scales(base, state.unet.eval().requires_grad_(False), recipe)


def with_scales(base: EditModel, unet: typing.Any, recipe: TrainingRecipe) -> EditModel:
    """``base`` with ``unet`` and the guidance scales that ``recipe`` gives to its model."""
    return dataclasses.replace(
        base, unet=unet, guidance_scale=recipe.guidance_scale, image_guidance_scale=recipe.image_guidance_scale
    )
