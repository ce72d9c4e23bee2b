"""Small real run folders, written with the library's own table code."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import numpy as np
import pytest

from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import shard_name, write_shard
from ip2p.dataset.tables import PROVENANCE, image_cell, ledger_record
from ip2p.images import encode_image
from ip2p.schema import Candidate, LedgerRow, Triplet
from ip2p.seeds import derive_seed, stable_id
from ip2p.storage import LocalFolder, open_folder

Record = dict[str, typing.Any]


def make_triplet(index: int) -> Triplet:
    return Triplet(
        f"a boat, number {index}", "make it night", f"a boat at night, number {index}", "tone", f"u://{index}"
    )


def smooth_pixels(seed: int, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """A gradient with a little grain, ``(H, W, 3)`` uint8: like a picture, so that JPEG has something to keep."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    base = rows * 5 + columns * 3
    colours = random.integers(0, 90, 3)
    return np.clip(base[..., None] + colours + random.integers(0, 6, (*size, 3)), 0, 255).astype(np.uint8)


def make_ledger_row(index: int, kept: int) -> LedgerRow:
    prompt_id = stable_id("test", index)
    candidates = tuple(
        Candidate(
            seed=derive_seed(prompt_id, k),
            p2p_threshold=0.1 + 0.1 * k,
            guidance_scale=7.5 + k,
            sim_original=0.21 + 0.01 * k,
            sim_edited=0.31 + 0.01 * k,
            sim_image=0.7 + 0.01 * k,
            sim_direction=0.4 - 0.05 * k,
            reason="kept" if k < kept else "below_image",
        )
        for k in range(kept + 1)
    )
    status = "accepted" if kept else "exhausted"
    return LedgerRow(prompt_id, index, status, "ok", make_triplet(index), candidates, row_evals=320)


def make_pairs(row: LedgerRow, image_format: str = "png") -> list[Record]:
    pairs = []
    for rank, candidate in enumerate(c for c in row.candidates if c.reason == "kept"):
        numbers = {name: value for name, value in dataclasses.asdict(candidate).items() if name != "reason"}
        pixels = smooth_pixels(candidate.seed), smooth_pixels(candidate.seed + 1)
        pairs.append(
            {
                "pair_id": stable_id(row.prompt_id, candidate.seed),
                "prompt_id": row.prompt_id,
                "index": row.index,
                "rank": rank,
                "original_image": image_cell(encode_image(pixels[0], image_format)),
                "edited_image": image_cell(encode_image(pixels[1], image_format)),
                "sampler": "euler_ancestral",
                "steps": 20,
                "p2p_mode": "cross",
                "width": 24,
                "height": 16,
                **dataclasses.asdict(row.triplet),
                **numbers,
                **dict.fromkeys(PROVENANCE, "abc"),
            }
        )
    return pairs


def write_run(
    root: Path, kept: typing.Sequence[int] = (2, 0, 1, 3, 1), per_shard: int = 2, image_format: str = "png"
) -> LocalFolder:
    """A finished run with ``kept[i]`` pairs of prompt ``i``."""
    folder, files = open_folder(str(root)), {}
    for number in range(-(-len(kept) // per_shard)):
        indices = range(number * per_shard, min(len(kept), (number + 1) * per_shard))
        rows = [make_ledger_row(index, kept[index]) for index in indices]
        pairs = [pair for row in rows for pair in make_pairs(row, image_format)]
        name = shard_name(number, [row.prompt_id for row in rows])
        files |= write_shard(folder, name, [ledger_record(row) for row in rows], pairs)
    write_manifest(folder, files)
    return typing.cast(LocalFolder, folder)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Surviving a power cut is tested where files are written (storage); here each fsync would only cost time.
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def run(tmp_path: Path) -> LocalFolder:
    """Five prompts in three shards, seven pairs; prompt 1 kept none."""
    return write_run(tmp_path / "run")


@pytest.fixture
def build_run(tmp_path: Path) -> typing.Callable[..., LocalFolder]:
    def build(name: str = "built", **options: typing.Any) -> LocalFolder:
        return write_run(tmp_path / name, **options)

    return build


@pytest.fixture
def ledger_row() -> typing.Callable[[int, int], LedgerRow]:
    return make_ledger_row


@pytest.fixture
def pairs_of() -> typing.Callable[..., list[Record]]:
    return make_pairs


@pytest.fixture
def tree_bytes() -> typing.Callable[[Path], dict[str, bytes]]:
    """All files below a folder with their bytes, to compare two trees whole."""

    def read(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    return read
