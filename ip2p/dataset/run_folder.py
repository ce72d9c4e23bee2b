"""A run on disk or S3: ``ledger/`` and ``pairs/`` shards of equal names, and the manifest that lists them.

Reads go shard by shard in shard order, so memory holds one shard however large the run; every file is checked against
the manifest before a row of it is used. Who fills a run is elsewhere (jobs/datagen.py, imported.py).
"""

from __future__ import annotations

import collections
import itertools
import typing

import pyarrow as pa
from PIL import Image

from ip2p.dataset.manifest import FileEntry, file_entry, read_listed, read_manifest, table_files
from ip2p.dataset.tables import (
    LEDGER_SCHEMA,
    PAIRS_SCHEMA,
    ledger_table,
    pairs_table,
    parquet_bytes,
    read_parquet_bytes,
)
from ip2p.errors import DatasetError, StorageError
from ip2p.images import decode_image
from ip2p.seeds import stable_id
from ip2p.storage import Folder

Record = dict[str, typing.Any]


def shard_name(number: int, prompt_ids: typing.Iterable[str]) -> str:
    """``part-00000-<hash8>.parquet``; the hash is of the prompts, so other prompts never overwrite a shard."""
    return f"part-{number:05d}-{stable_id(*prompt_ids)[:8]}.parquet"


def write_shard(
    folder: Folder, name: str, ledger: typing.Sequence[Record], pairs: typing.Sequence[Record]
) -> dict[str, FileEntry]:
    """Write both files of one shard and return their manifest entries. The ledger comes last: it is the commit."""
    entries = {}
    for kind, table in (("pairs", pairs_table(pairs)), ("ledger", ledger_table(ledger))):
        data = parquet_bytes(table)
        folder.write(f"{kind}/{name}", data)
        entries[f"{kind}/{name}"] = file_entry(data, table.num_rows)
    return entries


def iterate_pair_shards(folder: Folder, columns: list[str] | None = None) -> typing.Iterator[list[Record]]:
    """The pairs of a finished run, one list a shard; ``columns`` leaves the others out (the pictures, say).

    Raises DatasetError for a folder without manifest, or a shard that is not what the manifest says.
    """
    files = read_manifest(folder)
    for name in table_files(files, "pairs"):
        data = read_listed(folder, name, files[name])
        yield read_parquet_bytes(data, f"{folder.uri}/{name}", columns).to_pylist()


def iterate_pairs(folder: Folder, columns: list[str] | None = None) -> typing.Iterator[Record]:
    """The pairs of a finished run, one by one; see ``iterate_pair_shards``."""
    return itertools.chain.from_iterable(iterate_pair_shards(folder, columns))


def count_pairs(folder: Folder) -> int:
    """How many pairs a finished run holds, from its manifest alone."""
    files = read_manifest(folder)
    return sum(files[name]["rows"] for name in table_files(files, "pairs"))


def by_prompt(pairs: typing.Iterable[Record]) -> dict[str, list[Record]]:
    """The pairs of one shard under their ``prompt_id``, best rank first."""
    groups: dict[str, list[Record]] = {}
    for pair in pairs:
        groups.setdefault(pair["prompt_id"], []).append(pair)
    return {prompt_id: sorted(group, key=lambda pair: pair["rank"]) for prompt_id, group in groups.items()}


def pair_size(original: bytes, edited: bytes) -> tuple[int, int]:
    """Width and height in pixels that both encoded pictures share.

    Raises DatasetError if one does not decode to its last row, or if they differ in size.
    """
    sizes = []
    for which, data in (("original", original), ("edited", edited)):
        try:
            height, width, _ = decode_image(data).shape
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DatasetError(f"the {which} image cannot be decoded ({error})") from error
        sizes.append((width, height))
    if sizes[0] != sizes[1]:
        raise DatasetError(f"the original image is {sizes[0]} pixels and the edited one {sizes[1]}")
    return sizes[0]


def verify(folder: Folder) -> list[str]:
    """Everything that is wrong with a run, one sentence each; an empty list means that it is whole.

    Checks each file's bytes and hash, columns, counts, identities and every picture. Memory holds one shard, and the
    ids of all rows. A damaged shard is named and the others are still checked.
    """
    try:
        files = read_manifest(folder)
    except DatasetError as error:
        return [str(error)]
    problems = [
        f"{name}: not in the manifest; it is left from another run and is not read"
        for name in folder.list("ledger/") + folder.list("pairs/")
        if name not in files
    ]
    tables = {*table_files(files, "ledger"), *table_files(files, "pairs")}
    problems += [problem for name in files if name not in tables for problem in _file_problems(folder, name, files)]
    seen: set[tuple[str, str]] = set()
    for name in _shard_names(files):
        problems += _shard_problems(folder, name, files, seen)
    return problems


def _file_problems(folder: Folder, name: str, files: dict[str, FileEntry]) -> list[str]:
    try:
        read_listed(folder, name, files[name])
    except (DatasetError, StorageError) as error:
        return [str(error)]
    return []


def _shard_names(files: dict[str, FileEntry]) -> list[str]:
    names = [name.split("/", 1)[1] for kind in ("ledger", "pairs") for name in table_files(files, kind)]
    return list(dict.fromkeys(names))


def _shard_problems(folder: Folder, name: str, files: dict[str, FileEntry], seen: set[tuple[str, str]]) -> list[str]:
    try:
        ledger = _checked_rows(folder, f"ledger/{name}", files, LEDGER_SCHEMA)
        pairs = _checked_rows(folder, f"pairs/{name}", files, PAIRS_SCHEMA)
    except (DatasetError, StorageError) as error:
        return [str(error)]
    problems = _count_problems(ledger, pairs)
    for key, rows in (("prompt_id", ledger), ("pair_id", pairs)):
        problems += _duplicates(key, rows, seen)
    problems += [problem for pair in pairs for problem in _pair_problems(pair)]
    return [f"{name}: {problem}" for problem in problems]


def _checked_rows(folder: Folder, name: str, files: dict[str, FileEntry], schema: pa.Schema) -> list[Record]:
    if name not in files:
        raise DatasetError(f"{name}: the manifest does not list it, though it lists its other half; rerun datagen")
    table = read_parquet_bytes(read_listed(folder, name, files[name]), name)
    if not table.schema.equals(schema):
        raise DatasetError(f"{name}: its columns are not those of schema version 1; it was written by something else")
    if table.num_rows != files[name]["rows"]:
        raise DatasetError(f"{name}: {table.num_rows} rows, the manifest says {files[name]['rows']}")
    return table.to_pylist()


def _count_problems(ledger: list[Record], pairs: list[Record]) -> list[str]:
    found = collections.Counter(pair["prompt_id"] for pair in pairs)
    problems = [
        f"prompt {row['prompt_id']}: the ledger says {row['n_kept']} kept pairs, {found[row['prompt_id']]} are there"
        for row in ledger
        if row["n_kept"] != found[row["prompt_id"]]
    ]
    orphans = found.keys() - {row["prompt_id"] for row in ledger}
    return problems + [f"prompt {prompt_id}: has pairs but no ledger row" for prompt_id in sorted(orphans)]


def _duplicates(key: str, rows: list[Record], seen: set[tuple[str, str]]) -> list[str]:
    problems = []
    for row in rows:
        if (key, row[key]) in seen:
            problems.append(f"{key} {row[key]} appears twice in the run")
        seen.add((key, row[key]))
    return problems


def _pair_problems(pair: Record) -> list[str]:
    try:
        size = pair_size(pair["original_image"]["bytes"], pair["edited_image"]["bytes"])
    except DatasetError as error:
        return [f"pair {pair['pair_id']}: {error}"]
    said = (pair["width"], pair["height"])
    return [] if size == said else [f"pair {pair['pair_id']}: pictures are {size} pixels, its row says {said}"]
