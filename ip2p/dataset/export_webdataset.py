"""A run as WebDataset tar files, for trainers that stream.

A sample is ``{prompt_id}_{seed}`` with ``.0.png`` (original), ``.1.png`` (edited) and ``.json`` (all other columns,
under this project's own names, the split among them). Pictures keep their bytes and so their format: ``.jpg`` where the
run stores JPEG. Samples are in the run's order; a trainer shuffles.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import tarfile
import typing

from ip2p.dataset.claim import claim
from ip2p.dataset.manifest import MANIFEST
from ip2p.dataset.names import ORIGINAL_IMAGES
from ip2p.dataset.run_folder import Record, count_pairs, iterate_pairs
from ip2p.errors import DatasetError
from ip2p.storage import Folder, sha256

_SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}


def export_webdataset(
    run: Folder,
    output: Folder,
    progress: typing.Callable[[int], object] = lambda pairs: None,
    pairs_per_tar: int = 512,
) -> dict[str, int]:
    """Write the finished run ``run`` to ``output`` as ``shard-000000.tar`` … and return counts.

    Memory holds one tar. Raises DatasetError for an unfinished, damaged or empty run, InputError if ``output`` holds
    something else.
    """
    if not count_pairs(run):
        raise DatasetError(f"{run.uri}: no pair was kept, so there is nothing to export; see its summary.json")
    identity = {"format": "webdataset", "pairs_per_tar": pairs_per_tar}
    claim(output, "export.json", {**identity, "run_manifest_sha256": sha256(run.read(MANIFEST))})
    pairs, prompts = iterate_pairs(run), set[str]()
    counts = {"prompts": 0, "pairs": 0, "tars": 0}
    while rows := list(itertools.islice(pairs, pairs_per_tar)):
        output.write(f"shard-{counts['tars']:06d}.tar", _tar(rows))
        prompts.update(row["prompt_id"] for row in rows)
        counts = {"prompts": len(prompts), "pairs": counts["pairs"] + len(rows), "tars": counts["tars"] + 1}
        progress(len(rows))
    return counts


def _tar(rows: list[Record]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for name, data in _members(row).items():
                entry = tarfile.TarInfo(name)  # its time and owner are zero, so the same rows give the same bytes
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _members(row: Record) -> dict[str, bytes]:
    key = f"{row['prompt_id']}_{row['seed']}"
    if "." in key or "/" in key:
        raise DatasetError(f"prompt {row['prompt_id']!r}: WebDataset keys hold no dot or slash; give it a plain id")
    files = {}
    for column, number in ORIGINAL_IMAGES.items():
        data = row[column]["bytes"]
        files[f"{key}.{number}.{_suffix(data)}"] = data
    scalars = {name: _json_value(value) for name, value in row.items() if name not in ORIGINAL_IMAGES}
    return {**files, f"{key}.json": json.dumps(scalars).encode()}


def _suffix(data: bytes) -> str:
    for magic, suffix in _SUFFIXES.items():
        if data.startswith(magic):
            return suffix
    raise DatasetError("a picture is neither PNG, JPEG nor WebP; verify the run")


def _json_value(value: typing.Any) -> typing.Any:
    return None if isinstance(value, float) and math.isnan(value) else value  # NaN is not JSON
