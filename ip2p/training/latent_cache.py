"""Latents and text states encoded once: an epoch from this cache runs no VAE and no text encoder.

A cache is a folder of Parquet parts and a manifest, written last, whose identity names the pairs, the encoders and the
resolution. Numbers are fp16. Mirrored pictures are encoded too (the latent of a mirrored picture is not the mirrored
latent), and an instruction that several pairs of a part share is stored once. Who makes the parts, one process or a
cluster, is elsewhere: ``make_part`` is one piece of that work, and needs nothing but its arguments.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ip2p.dataset.manifest import MANIFEST, FileEntry, file_entry, read_listed
from ip2p.dataset.tables import read_parquet_bytes
from ip2p.errors import DatasetError
from ip2p.seeds import stable_id
from ip2p.storage import Folder
from ip2p.training.encoding import PairEncoder
from ip2p.training.pair_columns import PairColumns, encode_pictures
from ip2p.training.pair_index import Pages, Record, ShardRows, count_rows, read_shard_rows

FORMAT = 1
PAIRS_PER_PART = 512
CACHE_BUDGET_BYTES = 2**31
ENCODED_TOGETHER = 16  # pairs in one VAE call; more only need memory
PICTURES = ("edited_mean", "edited_std", "original_mode")
NULL_TEXT = "null_text.parquet"


@dataclass(frozen=True)
class CacheIdentity:
    """All that a cached number depends on. Two caches of equal identity hold the same numbers."""

    pairs: dict[str, str]  # split to the id of its shards and rows
    vae: str  # sha256
    text_encoder: str  # sha256
    resolution: int  # pixels
    mirrored: bool  # whether mirrored pictures are there too
    format: int = FORMAT

    def hash8(self) -> str:
        return stable_id(json.dumps(vars(self), sort_keys=True))[:8]


def cache_identity(
    splits: Mapping[str, Sequence[ShardRows]], sha256: Mapping[str, str], resolution: int, mirrored: bool
) -> CacheIdentity:
    """The identity of a cache of ``splits`` (``pair_index.list_pairs`` each), encoded by the weights of ``sha256``."""
    pairs = {
        split: stable_id(*(part for shard in shards for part in (shard.name, shard.entry["sha256"], *shard.rows)))
        for split, shards in splits.items()
    }
    return CacheIdentity(pairs, sha256["vae"], sha256["text_encoder"], resolution, mirrored)


def plan_parts(shards: Sequence[ShardRows], pairs_per_part: int = PAIRS_PER_PART) -> list[list[ShardRows]]:
    """``shards`` in order, gathered into parts of at least ``pairs_per_part`` pairs (the last may have fewer)."""
    parts: list[list[ShardRows]] = [[]]
    for shard in shards:
        if count_rows(parts[-1]) >= pairs_per_part:
            parts.append([])
        parts[-1].append(shard)
    return [part for part in parts if part]


class PlannedPart(typing.TypedDict):
    """What ``make_part`` is to make."""

    split: str
    number: int
    shards: Sequence[ShardRows]


def planned_parts(
    splits: Mapping[str, Sequence[ShardRows]], pairs_per_part: int = PAIRS_PER_PART
) -> dict[str, PlannedPart]:
    """All parts of a cache of ``splits``, by name."""
    return {
        f"{split}-{number}": {"split": split, "number": number, "shards": part}
        for split, shards in splits.items()
        for number, part in enumerate(plan_parts(shards, pairs_per_part))
    }


def cache_shard(
    records: Sequence[Record], encoder: PairEncoder, resolution: int, mirrored: bool
) -> tuple[pa.Table, pa.Table]:
    """``(pairs, texts)`` of ``records`` (``pair_index.TRAINING_COLUMNS``), in their order.

    ``pairs``: pair_id, ``text`` (a row of ``texts``), the three ``PICTURES`` and, if ``mirrored``, the same of the
    mirrored pictures, each a fixed-size fp16 array. A function of its arguments alone.
    """
    columns = {"pair_id": pa.array([record["pair_id"] for record in records])}
    for suffix in ("", "_mirrored") if mirrored else ("",):
        flips = np.full(len(records), bool(suffix))
        together = range(0, len(records), ENCODED_TOGETHER)
        chunks = [slice(first, first + ENCODED_TOGETHER) for first in together]
        encoded = [encode_pictures(records[chunk], flips[chunk], encoder, resolution) for chunk in chunks]
        for name, tensors in zip(PICTURES, zip(*encoded, strict=True), strict=True):
            columns[name + suffix] = _fp16_column(torch.cat(tensors))
    instructions = [record["instruction"] for record in records]
    unique = list(dict.fromkeys(instructions))
    columns["text"] = pa.array([unique.index(text) for text in instructions], pa.int32())
    return pa.table(columns), text_table(unique, encoder)


def text_table(texts: list[str], encoder: PairEncoder) -> pa.Table:
    """Texts and their states, each state a fixed-size fp16 array."""
    states = [encoder.texts(texts[first : first + 64]) for first in range(0, len(texts), 64)]
    return pa.table({"instruction": pa.array(texts), "state": _fp16_column(torch.cat(states))})


PART_FILES = ("pairs", "texts")
_PAIRS_END, _TEXTS_END = (f"-{kind}.parquet" for kind in PART_FILES)


def make_part(
    folder: Folder, identity: CacheIdentity, split: str, number: int, shards: Sequence[ShardRows], encoder: PairEncoder
) -> dict[str, FileEntry]:
    """Write part ``number`` of ``split`` unless it is there, and return its manifest entries.

    The names carry the identity, so a part that was left by an unfinished run of the same cache is used again, and one
    of another cache never.
    """
    pairs_name, texts_name = (f"{split}/part-{number:05d}-{identity.hash8()}-{kind}.parquet" for kind in PART_FILES)
    if not (folder.exists(pairs_name) and folder.exists(texts_name)):
        records = [record for shard in shards for record in read_shard_rows(shard)]
        pairs, texts = cache_shard(records, encoder, identity.resolution, identity.mirrored)
        folder.write(texts_name, _parquet(texts))
        folder.write(pairs_name, _parquet(pairs))
    return {name: _entry(folder.read(name)) for name in (pairs_name, texts_name)}


def finish_cache(
    folder: Folder,
    identity: CacheIdentity,
    files: Mapping[str, FileEntry],
    encoder: PairEncoder,
) -> None:
    """Write the states of the empty text and the manifest: from here on the cache can be read.

    Files of a finished cache of another identity that was here are deleted.
    """
    former = _read_manifest(folder)["files"] if folder.exists(MANIFEST) else ()
    null_text = _parquet(text_table([""], encoder))
    folder.write(NULL_TEXT, null_text)
    text_config = encoder.text_encoder.config
    content = {
        "identity": vars(identity),
        "latent_shape": encoder.latent_shape(identity.resolution),
        "text_shape": (text_config.max_position_embeddings, text_config.hidden_size),
        "files": {**files, NULL_TEXT: _entry(null_text)},
    }
    folder.write(MANIFEST, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    for name in former:
        if name not in files and name != NULL_TEXT:
            folder.delete(name)


def is_finished(folder: Folder, identity: CacheIdentity) -> bool:
    """Whether ``folder`` holds the whole cache of ``identity``. Raises DatasetError where it holds something else."""
    return folder.exists(MANIFEST) and not _differences(_read_manifest(folder), identity)


class CachedRows:
    """Pairs from a cache, in the same order as ``PictureRows`` over the same shards; tensors come out on ``device``.

    Raises DatasetError for a cache that is unfinished, of another identity, or whose parts are not whole.
    """

    def __init__(
        self,
        folder: Folder,
        identity: CacheIdentity,
        split: str = "train",
        device: torch.device | str = "cpu",
        budget_bytes: int = CACHE_BUDGET_BYTES,
    ):
        self.folder, self.device, self.mirrored = folder, torch.device(device), identity.mirrored
        manifest = _read_manifest(folder)
        if differences := _differences(manifest, identity):
            raise DatasetError(
                f"{folder.uri}: this cache was made for something else ({'; '.join(differences)}); "
                "make it again, or name another folder for it"
            )
        self.files: dict[str, FileEntry] = manifest["files"]
        self.latent_shape: tuple[int, int, int] = tuple(manifest["latent_shape"])
        self.text_shape: tuple[int, int] = tuple(manifest["text_shape"])
        self.null_state = self._tensor(self._table(NULL_TEXT), "state", self.text_shape)[0].float().to(self.device)
        self.parts = sorted(name for name in self.files if name.startswith(f"{split}/") and name.endswith(_PAIRS_END))
        self._pages = Pages([self.files[name]["rows"] for name in self.parts], self._part, budget_bytes)

    def __len__(self) -> int:
        return len(self._pages)

    def rows(self, indices: np.ndarray, flips: np.ndarray) -> PairColumns:
        """See ``pair_columns.PairSource``. Raises DatasetError for a flip that the cache does not hold."""
        if flips.any() and not self.mirrored:
            raise DatasetError(f"{self.folder.uri}: holds no mirrored pictures; make it with flip, or `--set flip=0`")
        count = len(indices)
        pictures = torch.empty((3, count, *self.latent_shape), dtype=torch.float16)
        states = torch.empty((count, *self.text_shape), dtype=torch.float16)
        for part, wanted, rows in self._pages.find(indices):
            turned = torch.from_numpy(flips[wanted].astype(np.int64))
            places, at = torch.from_numpy(wanted), torch.from_numpy(rows)
            pictures[:, places] = part.pictures[turned, :, at].transpose(0, 1)
            states[places] = part.states[part.text[at]]
        edited_mean, edited_std, original_mode = self._at_device(pictures)
        return PairColumns(edited_mean, edited_std, original_mode, self._at_device(states))

    def _at_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device, torch.float32)

    def _part(self, number: int) -> tuple[_Part, int]:
        name = self.parts[number]
        pairs = self._table(name)
        suffixes = ("", "_mirrored") if self.mirrored else ("",)
        pictures = torch.stack(
            [
                torch.stack([self._tensor(pairs, column + suffix, self.latent_shape) for column in PICTURES])
                for suffix in suffixes
            ]
        )
        states = self._tensor(self._table(name.replace(_PAIRS_END, _TEXTS_END)), "state", self.text_shape)
        part = _Part(pictures, states, torch.from_numpy(pairs["text"].to_numpy().astype(np.int64)))
        return part, pictures.nbytes + states.nbytes

    def _table(self, name: str) -> pa.Table:
        try:
            data = read_listed(self.folder, name, self.files[name])
        except DatasetError as error:
            finding = str(error).partition(";")[0]
            raise DatasetError(
                f"{finding}; delete this file and {self.folder.uri}/{MANIFEST} and run again: "
                "what is missing is made anew"
            ) from error
        return read_parquet_bytes(data, f"{self.folder.uri}/{name}")

    @staticmethod
    def _tensor(table: pa.Table, column: str, shape: tuple[int, ...]) -> torch.Tensor:
        cells = bytearray()
        for chunk in table[column].chunks:
            start, end = (row * chunk.type.byte_width for row in (chunk.offset, chunk.offset + len(chunk)))
            cells += memoryview(chunk.buffers()[1])[start:end]
        return torch.frombuffer(cells, dtype=torch.float16).reshape(len(table), *shape)


@dataclass(frozen=True)
class _Part:
    pictures: torch.Tensor  # (1 or 2: mirrored, 3: PICTURES, pairs, C, h, w) fp16
    states: torch.Tensor  # (texts, T, D) fp16
    text: torch.Tensor  # (pairs,) int64, rows of states


def _fp16_column(tensor: torch.Tensor) -> pa.Array:
    """``(n, ...)`` as ``n`` fixed-size binary cells of fp16 numbers."""
    numbers = tensor.detach().to("cpu", torch.float16).contiguous().numpy()
    width = numbers.nbytes // len(numbers)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(numbers), [None, pa.py_buffer(numbers.tobytes())])


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return typing.cast(bytes, sink.getvalue().to_pybytes())


def _entry(data: bytes) -> FileEntry:
    return file_entry(data, pq.ParquetFile(pa.BufferReader(data)).metadata.num_rows)


def _read_manifest(folder: Folder) -> dict[str, typing.Any]:
    if not folder.exists(MANIFEST):
        raise DatasetError(f"{folder.uri}/{MANIFEST} is missing: no finished cache is there; make it first")
    try:
        manifest = json.loads(folder.read(MANIFEST))
        if {"identity", "latent_shape", "text_shape", "files"} <= set(manifest):
            return typing.cast(dict[str, typing.Any], manifest)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{folder.uri}/{MANIFEST}: damaged ({error}); delete this folder and make the cache again"
        ) from error
    raise DatasetError(f"{folder.uri}/{MANIFEST}: not the manifest of a cache; name another folder")


def _differences(manifest: Mapping[str, typing.Any], identity: CacheIdentity) -> list[str]:
    found, wanted = manifest["identity"], vars(identity)
    return [f"{key} {found.get(key)!r}, wanted {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
