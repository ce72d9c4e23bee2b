"""From a training state to the edit model that is exported: the averaged weights, in the shape of any other model."""

from __future__ import annotations

import dataclasses
import typing

from ip2p.models.components import EditModel
from ip2p.training.ema import copy_into
from ip2p.training.lora import merge_lora
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.state import TrainingState


def trained_edit_model(base: EditModel, state: TrainingState) -> EditModel:
    """``base`` with the averaged UNet of ``state``, which must not be trained any further."""
    copy_into(state.parameters, state.ema.averages)
    if state.recipe.lora_rank:
        merge_lora(state.unet)
    return with_scales(base, state.unet.eval().requires_grad_(False), state.recipe)


def with_scales(base: EditModel, unet: typing.Any, recipe: TrainingRecipe) -> EditModel:
    """``base`` with ``unet`` and the guidance scales that ``recipe`` gives to its model."""
    return dataclasses.replace(
        base, unet=unet, guidance_scale=recipe.guidance_scale, image_guidance_scale=recipe.image_guidance_scale
    )
