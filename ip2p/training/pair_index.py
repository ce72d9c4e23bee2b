"""Kept pairs as one numbered list over any number of run folders, and random access to it without holding it.

A number stands for one row of one Parquet shard. Shards are read whole, checked against their manifest, and kept in
memory up to a budget; ``order.py`` sees to it that few are needed at a time. Pictures stay encoded here.
"""

from __future__ import annotations

import collections
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ip2p.dataset.manifest import FileEntry, read_listed, read_manifest, table_files
from ip2p.dataset.tables import SPLITS, read_parquet_bytes
from ip2p.errors import DatasetError
from ip2p.storage import open_folder

Record = dict[str, typing.Any]
V = typing.TypeVar("V")

SHARDS_AT_ONCE = 8  # read to be listed; more would only wait for the network and hold memory

TRAINING_COLUMNS = (
    "pair_id", "original_image", "edited_image", "caption", "instruction", "edited_caption",
)  # fmt: skip


@dataclass(frozen=True)
class ShardRows:
    """The rows of one pairs shard that belong to a split. Plain data: a driver lists once and sends it to workers."""

    folder: str  # uri of the run
    name: str  # pairs/part-....parquet
    entry: FileEntry
    rows: tuple[int, ...]


def list_pairs(uris: Sequence[str], split: str = "train") -> list[ShardRows]:
    """All pairs of ``split`` in finished runs, as ``list_splits`` finds them. DatasetError where there is none."""
    if split not in SPLITS:
        raise DatasetError(f"split {split!r}: there are {', '.join(SPLITS)}")
    found = list_splits(uris)[split]
    if not found:
        raise no_pairs(uris, split)
    return found


def no_pairs(uris: Sequence[str], split: str) -> DatasetError:
    """What to say where ``uris`` hold no pair of ``split``."""
    where = ", ".join(uris) or "no run folder at all"
    return DatasetError(f"no pair of split {split!r} in {where}; name run folders with kept pairs")


def list_splits(uris: Sequence[str]) -> dict[str, list[ShardRows]]:
    """The pairs of each split in finished runs, shard by shard in the order given; shards without any are left out.

    Reads every shard once, so a damaged one is named before training starts. Raises DatasetError for such a shard or
    an unfinished run.
    """
    listed = [(uri, name, entry) for uri in uris for name, entry in _shards(uri)]
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
        columns = list(threads.map(lambda shard: _splits_of(*shard), listed))
    found: dict[str, list[ShardRows]] = {split: [] for split in SPLITS}
    for shard, values in zip(listed, columns, strict=True):
        for split in found:
            rows = tuple(row for row, value in enumerate(values) if value == split)
            if rows:
                found[split].append(ShardRows(*shard, rows))
    return found


def _shards(uri: str) -> list[tuple[str, FileEntry]]:
    files = read_manifest(open_folder(uri))
    return [(name, files[name]) for name in table_files(files, "pairs")]


def _splits_of(uri: str, name: str, entry: FileEntry) -> list[str]:
    data = read_listed(open_folder(uri), name, entry)
    return typing.cast(list[str], read_parquet_bytes(data, f"{uri}/{name}", ["split"])["split"].to_pylist())


def count_rows(shards: Sequence[ShardRows]) -> int:
    return sum(len(shard.rows) for shard in shards)


def read_shard_rows(shard: ShardRows, columns: Sequence[str] = TRAINING_COLUMNS) -> list[Record]:
    """The listed rows of one shard as records. Raises DatasetError where its bytes are not those of the manifest."""
    return rows_table(shard, columns).to_pylist()


def rows_table(shard: ShardRows, columns: Sequence[str] = TRAINING_COLUMNS) -> pa.Table:
    """As ``read_shard_rows``, in Arrow's form."""
    data = read_listed(open_folder(shard.folder), shard.name, shard.entry)
    return read_parquet_bytes(data, f"{shard.folder}/{shard.name}", list(columns)).take(pa.array(shard.rows))


class Pages(typing.Generic[V]):
    """Numbered rows in pages of known lengths; the pages used last stay in memory up to ``budget_bytes``.

    ``read(page)`` makes a page and says how many bytes it holds. One page is kept, however large.
    """

    def __init__(self, lengths: Sequence[int], read: Callable[[int], tuple[V, int]], budget_bytes: int):
        self.ends = np.cumsum(np.asarray(lengths, np.int64))
        self.read, self.budget_bytes = read, budget_bytes
        self._held: collections.OrderedDict[int, tuple[V, int]] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def find(self, indices: np.ndarray) -> list[tuple[V, np.ndarray, np.ndarray]]:
        """``(page, wanted, rows)`` for each page that ``indices`` touch: ``indices[wanted]`` are its ``rows``."""
        pages = np.searchsorted(self.ends, indices, side="right")
        found = []
        for page in np.unique(pages):
            wanted = np.flatnonzero(pages == page)
            start = self.ends[page - 1] if page else 0
            found.append((self._page(int(page)), wanted, indices[wanted] - start))
        return found

    def _page(self, page: int) -> V:
        if page not in self._held:
            self._held[page] = self.read(page)
        self._held.move_to_end(page)
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self.budget_bytes:
            self._held.popitem(last=False)
        return self._held[page][0]
