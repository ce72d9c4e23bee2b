"""Weight folders that are verified before they are used.

A manifest lists every file of a folder with its size and SHA-256. Loading verifies first, so that a download that
broke off or a flipped bit is named here, in a sentence, and not deep inside a reader of tensors. This file knows
files and bytes only; what the tensors mean is for ``ip2p.models.components``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ip2p.errors import CheckpointError
from ip2p.storage import LocalFolder

if typing.TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
PICKLED = (".bin", ".ckpt", ".pt", ".pth")

FETCH_AGAIN = "fetch the file again"
REBUILD = "run `make weights`, or fetch the project again"
CONVERT = (
    "convert it once with DiffusionPipeline.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True) "
    "and name NEW_DIR; pickled weights can run code and are never opened here"
)


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one component, and the variant under which diffusers and transformers know them."""

    files: tuple[Path, ...]
    variant: str | None = None


def write_manifest(folder: Path, about: Mapping[str, object] | None = None) -> None:
    """List all files below ``folder`` in its ``manifest.json``; ``about`` is kept as it is (how they were made)."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: _described(folder / name) for name in names if name != MANIFEST and not name.endswith(".partial")}
    text = json.dumps({"about": dict(about or {}), "files": files}, indent=2, sort_keys=True) + "\n"
    LocalFolder(folder).write(MANIFEST, text.encode())


def verify_manifest(folder: Path, files: Iterable[str] | None = None, remedy: str = REBUILD) -> None:
    """Compare ``files`` (default: all that are listed) with ``folder/manifest.json``.

    Raises CheckpointError at the first file that is absent, of another size or of other bytes.
    """
    listed = read_manifest(folder, remedy)["files"]
    for name in sorted(listed) if files is None else files:
        if name not in listed:
            raise CheckpointError(f"{folder / name}: not listed in {folder / MANIFEST}; {remedy}")
        _verify_file(folder / name, listed[name], remedy)


def read_manifest(folder: Path, remedy: str = REBUILD) -> dict[str, typing.Any]:
    """``{"about": {...}, "files": {name: {"bytes", "sha256"}}}``; raises CheckpointError where that cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if all({"bytes", "sha256"} <= set(entry) for entry in manifest["files"].values()):
            return typing.cast(dict[str, typing.Any], manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, so nothing here can be verified; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}); {remedy}") from error
    raise CheckpointError(f"{path}: not a readable manifest (an entry lacks bytes or sha256); {remedy}")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file. A file that has not changed on disk is hashed once per process."""
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns)


def weights_sha256(files: Sequence[Path]) -> str:
    """One id for a component's weights: the file's SHA-256, or, of several shards, that of their digests in order."""
    digests = [file_sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def find_weights(folder: Path, stem: str) -> Weights:
    """The safetensors files ``stem`` of a component folder: one file, indexed shards, or the fp16 variant.

    Each is checked to be whole. Raises CheckpointError for a folder without any; one with pickles only gets the
    way to convert them.
    """
    for variant in (None, "fp16"):
        middle = f".{variant}" if variant else ""
        single = folder / f"{stem}{middle}.safetensors"
        index = folder / f"{stem}.safetensors.index{middle}.json"
        if single.is_file() and index.is_file():
            raise CheckpointError(
                f"{index}: found beside {single.name}, expected one of the two, because libraries differ in which "
                "they read; delete the older"
            )
        if single.is_file() or index.is_file():
            files = (single,) if single.is_file() else _shards(index)
            for path in files:
                check_safetensors(path)
            return Weights(files, variant)
    refuse_pickles(folder)
    raise CheckpointError(f"{folder / stem}.safetensors: no such file; name a folder with whole weights")


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError where a folder holds pickled weights and no safetensors."""
    pickled = sorted(path for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{pickled[0]}: found pickled weights, expected .safetensors; {CONVERT}")


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError unless the file has the length that its own header states."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            header = file.read(header_bytes) if header_bytes < size else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {FETCH_AGAIN}") from error
    if start == b"version ":
        raise CheckpointError(f"{path}: found a Git LFS pointer, expected weights; run `git lfs pull` there")
    expected = 8 + header_bytes + _tensor_bytes(path, size, header)
    if size != expected:
        raise CheckpointError(f"{path}: found {size} bytes, expected {expected} (cut short?); {FETCH_AGAIN}")


def check_finite(model: torch.nn.Module, where: Path) -> None:
    """Raise CheckpointError where a parameter or buffer holds NaN or Inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{where}: {name} has {bad} values that are NaN or Inf as {tensor.dtype}, expected none; "
                f"{FETCH_AGAIN}, or load it as float32 (`--set models.dtype=float32`)"
            )


def _tensor_bytes(path: Path, size: int, header: bytes) -> int:
    try:
        entries = json.loads(header)
        return max((int(e["data_offsets"][1]) for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: found {size} bytes whose safetensors header is unreadable, expected whole weights; {FETCH_AGAIN}"
        ) from error


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = tuple(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({error}); {FETCH_AGAIN}") from error
    if not files:
        raise CheckpointError(f"{index}: not a readable index of shards (it names none); {FETCH_AGAIN}")
    return files


def _described(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _verify_file(path: Path, expected: Mapping[str, object], remedy: str) -> None:
    try:
        found = path.stat().st_size
        if found != expected["bytes"]:
            raise CheckpointError(f"{path}: found {found} bytes, expected {expected['bytes']}; {remedy}")
        digest = file_sha256(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, expected {expected['bytes']} bytes; {remedy}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if digest != expected["sha256"]:
        raise CheckpointError(f"{path}: found sha256 {digest}, expected {expected['sha256']}; {remedy}")


@functools.lru_cache(maxsize=1024)
def _hashed(path: Path, size: int, modified_ns: int) -> str:
    """``size`` and ``modified_ns`` are part of the key, so that a file that was replaced is hashed anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
