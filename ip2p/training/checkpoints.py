"""Training checkpoints: ``step-00001000/`` with safetensors, ``state.json`` and a manifest, whole or absent.

The manifest lists the SHA-256 of every other file and is written last; a folder without one does not exist for any
reader and is cleared away by the next save. Reading verifies every byte, and falls back to the checkpoint before,
loudly. Local or ``s3://`` (``ip2p.storage``). No pickle. What the tensors mean is for loop.py.
"""

from __future__ import annotations

import json
import re
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from ip2p.errors import CheckpointError, StorageError
from ip2p.storage import Folder, remove_all, sha256

MANIFEST, STATE = "manifest.json", "state.json"
PART_BYTES = 2**30
"""A file holds about this much: little memory while saving, and far below the 5 GB that one S3 upload may have."""
FOLDER = re.compile(r"step-(\d{8,})/")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a step left. ``tensors``: group (unet, ema, exp_avg, ...) to name to tensor, on the CPU."""

    step: int
    state: dict[str, typing.Any]
    tensors: dict[str, Tensors]


def save_checkpoint(folder: Folder, checkpoint: Checkpoint, keep: int, part_bytes: int = PART_BYTES) -> None:
    """Write ``checkpoint``, then remove all but the newest ``keep`` and whatever unfinished saves have left.

    Raises StorageError (the disk is full, say); the checkpoints that were there are then untouched, and what was
    written of the new one is removed.
    """
    name = f"step-{checkpoint.step:08d}/"
    try:
        _remove(folder, name)
        files = {part: _write(folder, name + part, data) for part, data in _parts(checkpoint, part_bytes)}
        folder.write(name + MANIFEST, _json({"step": checkpoint.step, "files": files}))
    except StorageError:
        _remove(folder, name)
        raise
    # Later ones belong to a past that was given up, when a run went back to an earlier checkpoint.
    past = [step for step in finished_steps(folder) if step <= checkpoint.step]
    kept = {f"step-{step:08d}/" for step in past[-keep:]}
    for found in _folders(folder) - kept:
        _remove(folder, found)


def finished_steps(folder: Folder) -> list[int]:
    """The steps that have a manifest, rising. Their bytes are not looked at."""
    names = [name for name in folder.list("step-") if name.endswith(f"/{MANIFEST}")]
    return sorted(int(match[1]) for name in names if (match := FOLDER.match(name)))


def latest_whole(folder: Folder, groups: Collection[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; None where none was ever finished.

    With ``groups`` only those tensors are read, and only their bytes are looked at.

    One that is damaged is named in a RuntimeWarning, and the one before is tried. Raises CheckpointError where all
    that there are are damaged: to start over without a word would be worse.
    """
    steps = finished_steps(folder)
    problems = []
    for step in reversed(steps):
        try:
            return read_checkpoint(folder, step, groups)
        except CheckpointError as error:
            problems.append(str(error))
            warnings.warn(f"{error}; going back to the checkpoint before", RuntimeWarning, stacklevel=2)
    if problems:
        raise CheckpointError(
            f"{folder.uri}: none of {len(problems)} checkpoints is whole ({problems[0]}); "
            "restore one of them, or name another folder to start over"
        )
    return None


def read_checkpoint(folder: Folder, step: int, groups: Collection[str] | None = None) -> Checkpoint:
    """Read and verify one checkpoint; raises CheckpointError with the file, the finding and the expectation.

    A place that cannot be reached is a StorageError: that says nothing about the checkpoint.
    """
    from safetensors.torch import load

    name = f"step-{step:08d}/"
    tensors: dict[str, Tensors] = {}
    state: dict[str, typing.Any] = {}
    for part, entry in _manifest(folder, name).items():
        group = part.partition("-")[0]
        if part == STATE:
            state = json.loads(_verified(folder, name + part, entry))
        elif groups is None or group in groups:
            tensors.setdefault(group, {}).update(load(_verified(folder, name + part, entry)))
    return Checkpoint(step, state, tensors)


def _parts(checkpoint: Checkpoint, part_bytes: int) -> Iterator[tuple[str, bytes]]:
    from safetensors.torch import save

    for group, tensors in checkpoint.tensors.items():
        for number, part in enumerate(_cut(tensors, part_bytes)):
            yield f"{group}-{number:03d}.safetensors", save(part)
    yield STATE, _json(checkpoint.state)


def _cut(tensors: Mapping[str, torch.Tensor], part_bytes: int) -> Iterator[Tensors]:
    """Copies on the CPU, a part at a time, so that no second copy of all weights is ever held."""
    part: Tensors = {}
    held = 0
    for name, tensor in tensors.items():
        if part and held + tensor.nbytes > part_bytes:
            yield part
            part, held = {}, 0
        part[name] = tensor.detach().to("cpu").contiguous()
        held += tensor.nbytes
    yield part


def _write(folder: Folder, name: str, data: bytes) -> dict[str, object]:
    folder.write(name, data)
    return {"bytes": len(data), "sha256": sha256(data)}


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _manifest(folder: Folder, name: str) -> dict[str, dict[str, typing.Any]]:
    where = f"{folder.uri}/{name}{MANIFEST}"
    data = folder.read(name + MANIFEST)
    try:
        files = json.loads(data)["files"]
        if STATE in files and all({"bytes", "sha256"} <= set(entry) for entry in files.values()):
            return typing.cast(dict[str, dict[str, typing.Any]], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a readable manifest ({error})") from error
    raise CheckpointError(f"{where}: not the manifest of a checkpoint")


def _verified(folder: Folder, name: str, entry: Mapping[str, typing.Any]) -> bytes:
    where = f"{folder.uri}/{name}"
    if not folder.exists(name):
        raise CheckpointError(f"{where}: no such file, expected {entry['bytes']} bytes")
    data = folder.read(name)
    if len(data) != entry["bytes"]:
        raise CheckpointError(f"{where}: found {len(data)} bytes, expected {entry['bytes']}")
    if (found := sha256(data)) != entry["sha256"]:
        raise CheckpointError(f"{where}: found sha256 {found}, expected {entry['sha256']}")
    return data


def _folders(folder: Folder) -> set[str]:
    return {match[0] for name in folder.list("step-") if (match := FOLDER.match(name))}


def _remove(folder: Folder, name: str) -> None:
    """The manifest goes first: a removal that breaks off leaves a checkpoint that is absent, not damaged."""
    if folder.exists(name + MANIFEST):
        folder.delete(name + MANIFEST)
    remove_all(folder, name)
