"""Weights that arrive whole: fetched in pieces, resumed, verified, and only then put in their place.

Files gather in a folder beside the target, each under another name until its bytes are those that the source promised.
The target appears by one rename, so whatever is killed, nothing that loads is ever half there. One process of a machine
fetches a target; others wait and find it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ip2p.errors import CheckpointError, StorageError
from ip2p.models.checkpoint import (
    FETCH_AGAIN,
    MANIFEST,
    PICKLED,
    check_safetensors,
    file_sha256,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from ip2p.models.weight_sources import BrokenOffError, RemoteFile, Source
from ip2p.storage import S3Folder, open_folder

THREADS = 4
TRIES = 6  # without a byte between them
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0

Tell = Callable[[int], object]
"""Told of bytes as they arrive; a negative number takes some back."""


def fetch(
    source: Source,
    target: Path,
    tell: Tell = lambda count: None,
    say: Callable[[str], object] = print,
    planned: Callable[[Sequence[RemoteFile]], object] = lambda files: None,
) -> bool:
    """Bring the weights of ``source`` to the folder ``target``; False where they were there already, whole.

    Raises StorageError where the source or the disk fails for good, CheckpointError for bytes that are not what was
    promised or cannot be weights; what has arrived stays for the next try. ``planned`` is told what will be brought.
    """
    with _one_writer(target, say):
        if (target / MANIFEST).is_file():
            verify_manifest(target, remedy=f"delete {target} and fetch it again")
            return False
        if target.exists() and any(target.iterdir()):
            raise StorageError(f"{target}: holds something that was not fetched (no {MANIFEST}); choose another folder")
        files = _checked_names(source)
        staging = target.with_name(f".{target.name}.partial")
        _check_room(staging, files)
        planned(files)
        with ThreadPoolExecutor(THREADS) as threads:
            for done in [threads.submit(_bring, source, file, staging, tell) for file in files]:
                done.result()
        _finish(staging, target, source)
        return True


def mirror(folder: Path, target: str) -> int:
    """Copy the verified ``folder`` to ``target`` (s3:// or a folder), its manifest last; how many files were copied.

    Files that are there in their size are not copied again; who fetches verifies all of them.
    """
    verify_manifest(folder, remedy="fetch it again: `ip2p weights fetch`")
    listed = read_manifest(folder)["files"]
    there = {file.name: file.size for file in _files_at(target)}
    place = open_folder(target)
    missing = [name for name in sorted(listed) if there.get(name) != listed[name]["bytes"]]
    for name in [*missing, MANIFEST]:
        with (folder / name).open("rb") as file:
            place.write_from(name, file)
    return len(missing)


def _files_at(target: str) -> list[RemoteFile]:
    """What lies there, whatever a manifest says."""
    if target.startswith("s3://"):
        return [RemoteFile(name, size) for name, size in typing.cast(S3Folder, open_folder(target)).sizes()]
    paths = [path for path in Path(target).rglob("*") if path.is_file()]
    return [RemoteFile(path.relative_to(target).as_posix(), path.stat().st_size) for path in paths]


def total_bytes(files: Sequence[RemoteFile]) -> int:
    return sum(file.size for file in files)


def _checked_names(source: Source) -> list[RemoteFile]:
    """The files to bring. A manifest from elsewhere may name any path: none may lead out of the folder."""
    files = [file for file in source.files() if file.name != MANIFEST]
    for file in files:
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f"{source.uri}: lists {file.name!r}, which lies outside of the folder; do not trust it"
            )
        if path.suffix in PICKLED:
            raise CheckpointError(
                f"{source.uri}: {file.name} is pickled and can run code; convert it first: `ip2p weights convert`"
            )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{source.uri}: found no .safetensors among {len(files)} files; name a folder of weights")
    return files


def _check_room(staging: Path, files: Sequence[RemoteFile]) -> None:
    staging.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    needed, free = total_bytes(files) - there, shutil.disk_usage(staging).free
    if needed > free:
        raise StorageError(
            f"{staging.parent}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB more are needed; free space", "full"
        )


def _bring(source: Source, file: RemoteFile, staging: Path, tell: Tell) -> None:
    """One file, whole and verified; where its bytes are wrong, once more from its beginning."""
    path = staging / file.name
    if path.exists() and path.stat().st_size == file.size and (not file.sha256 or file_sha256(path) == file.sha256):
        tell(file.size)
        return
    for last in (False, True):
        partial = _downloaded(source, file, path.with_name(f"{path.name}.part"), tell)
        problem = _problem_of(partial, file, path.name)
        if not problem:
            os.replace(partial, path)  # noqa: PTH105
            return
        tell(-partial.stat().st_size)
        partial.unlink()
        if last:
            raise CheckpointError(f"{source.uri}/{file.name}: {problem}; the source is damaged, take another")


def _downloaded(source: Source, file: RemoteFile, partial: Path, tell: Tell) -> Path:
    """All bytes of ``file`` in ``partial``, which may hold some; asks again as long as any arrive between failures."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    in_vain = 0
    told = partial.stat().st_size if partial.exists() else 0
    tell(told)
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _append(source, file, partial, tell)
            return partial
        except BrokenOffError as error:
            after = partial.stat().st_size if partial.exists() else 0
            in_vain = 0 if after > before else in_vain + 1
            if in_vain >= TRIES:
                raise StorageError(
                    f"{error}; gave up after {TRIES} tries, run the same command to go on", "away"
                ) from error
        except OSError as error:
            raise StorageError(
                f"{partial}: cannot be written ({error.strerror or error}); free space", "full"
            ) from error
        time.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**in_vain))


def _append(source: Source, file: RemoteFile, partial: Path, tell: Tell) -> None:
    """Read on from where ``partial`` ends. Bytes of two versions of a file are never joined."""
    note = partial.with_name(f"{partial.name}.version")
    version = note.read_text() if note.exists() and partial.exists() else ""
    there = partial.stat().st_size if version else 0
    if there and there == file.size:
        return
    with source.read(file.name, there, version) as stream:
        if stream.total >= 0 and stream.total != file.size:
            raise CheckpointError(
                f"{source.uri}/{file.name}: the server says {stream.total} bytes, expected {file.size}; it was changed "
                "or is not what it claims; take another source"
            )
        note.write_text(stream.version)
        with partial.open("r+b" if partial.exists() else "wb") as out:
            tell(stream.start - (out.seek(0, os.SEEK_END)))
            out.seek(stream.start)
            out.truncate()
            for piece in stream.pieces:
                if out.tell() + len(piece) > file.size:
                    raise CheckpointError(
                        f"{source.uri}/{file.name}: more than the {file.size} bytes that were promised"
                    )
                out.write(piece)
                tell(len(piece))
            out.flush()
            os.fsync(out.fileno())
            if out.tell() < file.size:
                raise BrokenOffError(f"{source.uri}/{file.name}: broke off after {out.tell()} of {file.size} bytes")


def _problem_of(path: Path, file: RemoteFile, name: str) -> str:
    """What is wrong with a file that has all its bytes; empty: nothing."""
    if file.sha256:
        digest = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        if digest != file.sha256:
            return f"found sha256 {digest}, expected {file.sha256}"
    if name.endswith(".safetensors"):
        try:
            check_safetensors(path)
        except CheckpointError as error:
            return str(error).removeprefix(f"{path}: ").removesuffix(f"; {FETCH_AGAIN}")
    return ""


def _finish(staging: Path, target: Path, source: Source) -> None:
    """Look at all tensors once, list the files, and put the folder in its place."""
    for path in sorted(staging.rglob("*.version")):
        path.unlink()
    for path in sorted(staging.rglob("*.safetensors")):
        _check_numbers(path, source)
    write_manifest(staging, {"fetched_from": source.uri})
    if target.exists():
        target.rmdir()  # it is empty
    staging.rename(target)


def _check_numbers(path: Path, source: Source) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                path.unlink()
                raise CheckpointError(
                    f"{source.uri}/{path.name}: {name} holds NaN or Inf, expected numbers; take another source"
                )


@contextmanager
def _one_writer(target: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Only one process of this machine is in here for ``target``; the kernel lets go of one that dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{target}: another process is fetching it; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Told:
    """Bytes so far, summed over threads, for a bar."""

    def __init__(self, show: Callable[[int], object]):
        self._show, self._lock = show, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._show(count)
