"""Gradients averaged over the workers of a run, by ``torch.distributed``; who starts the workers is for a job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

BUCKET_BYTES = 2**26
"""Gradients are sent in pieces of about this much: one message each would be slow, one for all would copy all."""


def mean_over_workers(gradients: Sequence[torch.Tensor]) -> None:
    """Replace each of ``gradients`` by its mean over all workers of the process group, in place."""
    world = dist.get_world_size()
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        if bucket and sum(held.nbytes for held in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
