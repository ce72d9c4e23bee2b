"""Weights, gradients, average and moments cut into shards, one a worker (FSDP), for a UNet that no one GPU holds.

A worker's tensors are then ``DTensor``s. What training does to each number alone is done to the shards; a norm, a
checkpoint and a restored value are of the whole. Checkpoints do not show how they were made: a sharded run may go on
unsharded, and the other way round.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from ip2p.errors import InputError


def shard_unet(unet: typing.Any, device: torch.device | str) -> None:
    """Cut ``unet`` over all workers of the process group, block by block: only one block at a time is ever whole.

    A UNet on the CPU is brought to ``device`` a shard at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None:
            fully_shard(block, mesh=mesh)
    # What lies outside of the blocks would stay whole after a forward without backward, and the next forward would
    # take it as it then was: the averages of a look at held-out pairs, say.
    fully_shard(unet, mesh=mesh, reshard_after_forward=True)


def check_shards(global_batch: int, workers: tuple[int, int]) -> None:
    """Raise InputError where some count of workers would leave one of them waiting for a call that another lacks."""
    unequal = [count for count in range(workers[0], workers[1] + 1) if global_batch % count]
    if unequal:
        raise InputError(
            f"--shard gives every worker the same number of samples, and global_batch={global_batch} is no multiple of "
            f"{unequal[0]} workers; choose other --workers, or `--set global_batch=`a multiple of all of them"
        )


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This worker's part of each tensor, sharing its memory; a tensor that is not sharded is its own part."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of ``tensor``, on the CPU of worker 0 and on the others an empty one. Where sharded, all workers must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)


def fill(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Copy the whole ``value``, which every worker has, into ``target`` or into this worker's part of it."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return target.copy_(value)
