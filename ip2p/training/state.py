"""All that changes while training: weights, their average, the optimizer's moments and the number of steps done.

Nothing else does: order, draws and learning rate are functions of the step. So this, saved and restored, is the whole
of resuming. How it lies in a folder is for checkpoints.py.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ip2p.errors import CheckpointError, InputError
from ip2p.models.widening import widen
from ip2p.training.checkpoints import Checkpoint, Tensors
from ip2p.training.ema import Ema, copy_into
from ip2p.training.lora import add_lora
from ip2p.training.loss import Forward, memory_format
from ip2p.training.muon import BUFFER, Muon
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.sharding import fill, shard_unet, whole

MOMENTS = ("exp_avg", "exp_avg_sq", "step", BUFFER)
DEFAULTS = dataclasses.asdict(TrainingRecipe(""))
MAY_CHANGE = (
    "name", "base", "steps", "micro_batch", "checkpoint_every", "keep_checkpoints", "guidance_scale",
    "image_guidance_scale", "learning_rate", "max_grad_norm", "precision",
)  # fmt: skip
"""Recipe fields with which a run may go on under another value: where the base lies (its weights are named by their
hashes beside the recipe), and the remedies for a loss that is no number included."""


@dataclass
class TrainingState:
    """``forward`` is what a step calls: the UNet, or a wrapper of it (compiled, say) that shares its parameters."""

    unet: typing.Any
    parameters: dict[str, torch.nn.Parameter]  # those that are trained
    ema: Ema
    optimizer: torch.optim.Optimizer | Muon
    recipe: TrainingRecipe
    forward: Forward
    step: int = 0  # optimizer steps done


def start_training(
    unet: typing.Any, recipe: TrainingRecipe, gradient_checkpointing: bool = False, shard_on: typing.Any = None
) -> TrainingState:
    """Widen ``unet`` (text-to-image, or an edit model already), make it float32 and trainable, and build the rest.

    ``gradient_checkpointing`` trades a third more arithmetic for memory; with a device, ``shard_on`` cuts all of it
    over the workers of the process group, there. Raises CheckpointError for a UNet of a width
    that cannot be used, InputError where LoRA is asked for without peft.
    """
    unet = widen(unet).float().requires_grad_(True).train()
    # Only weights in the usual memory order can be cut into shards.
    unet = unet.to(memory_format=memory_format(unet.device) if shard_on is None else torch.contiguous_format)
    if recipe.lora_rank:
        add_lora(unet, recipe.lora_rank, recipe.seed)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if shard_on is not None:
        shard_unet(unet, shard_on)
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    return TrainingState(
        unet, parameters, Ema(parameters, recipe.ema_decay), _optimizer(parameters, recipe), recipe, forward=unet
    )


def _optimizer(parameters: dict[str, torch.nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer | Muon:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "muon":
        return Muon(parameters, rate, decay)
    return torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=decay, fused=True)


def as_checkpoint(state: TrainingState, about: Mapping[str, str]) -> Checkpoint:
    """What ``restore`` needs. ``about`` names what the run depends on beside its recipe: base weights, pairs.

    Where the state is sharded all workers must call this, and worker 0 is given the tensors.
    """
    tensors: dict[str, Tensors] = {"unet": dict(state.parameters), "ema": state.ema.averages}
    for moment in MOMENTS:
        of = ((name, state.optimizer.state.get(p, {}).get(moment)) for name, p in state.parameters.items())
        if held := {name: value for name, value in of if value is not None}:
            tensors[f"optimizer_{moment}"] = held
    tensors = {group: {name: whole(value) for name, value in held.items()} for group, held in tensors.items()}
    known = {"recipe": dataclasses.asdict(state.recipe), "about": dict(about)}
    return Checkpoint(state.step, known, tensors)


@torch.no_grad()
def restore(state: TrainingState, checkpoint: Checkpoint, about: Mapping[str, str]) -> None:
    """Put ``state`` (fresh from ``start_training``) where the run of ``checkpoint`` was.

    Raises InputError where the recipe or ``about`` is another, CheckpointError where the weights are of another UNet.
    """
    _check_same_run(checkpoint, state.recipe, about)
    for group in ("unet", "ema"):
        _check_shapes(group, checkpoint.tensors.get(group, {}), state.parameters)
    copy_into(state.parameters, checkpoint.tensors["unet"])
    copy_into(state.ema.averages, checkpoint.tensors["ema"])
    for name, parameter in state.parameters.items():
        saved = {moment: checkpoint.tensors.get(f"optimizer_{moment}", {}).get(name) for moment in MOMENTS}
        moments = {moment: _laid_out_like(parameter, value) for moment, value in saved.items() if value is not None}
        if moments:
            state.optimizer.state[parameter] = moments
    state.step = checkpoint.step


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In the parameter's memory order, as the optimizer would have made it: another order may move last bits."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)  # the scalar count of steps
    return fill(torch.empty_like(parameter), value)


def _check_same_run(checkpoint: Checkpoint, recipe: TrainingRecipe, about: Mapping[str, str]) -> None:
    # A field that the run's version did not know yet had what is now its default.
    was, now = DEFAULTS | checkpoint.state["recipe"], dataclasses.asdict(recipe)
    changed = [
        f"{name} was {was.get(name)!r}, is {now[name]!r}"
        for name in now
        if name not in MAY_CHANGE and was.get(name) != now[name]
    ]
    before = checkpoint.state["about"]
    changed += [
        f"{name} was {before.get(name)}, is {value}" for name, value in about.items() if before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"the checkpoint of step {checkpoint.step} belongs to another run ({'; '.join(changed)}); "
            "use the same recipe, base and pairs, or name another folder to start anew"
        )


def _check_shapes(group: str, found: Tensors, expected: Mapping[str, torch.Tensor]) -> None:
    differing = sorted(name for name in found.keys() ^ expected.keys())
    differing += [name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape]
    if differing:
        raise CheckpointError(
            f"{group} of the checkpoint has other tensors than this UNet, the first {differing[0]}; "
            "start from the base that the run began with"
        )
