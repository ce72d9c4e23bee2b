"""A folder of Parquet files with the five columns of ``timbrooks/instructpix2pix-clip-filtered`` as a run folder.

Consecutive rows with the same three texts are pairs of one prompt. The files know no seed, so a pair's seed is its
number within the prompt. Nothing is downloaded: get the files first.
"""

from __future__ import annotations

import itertools
import re
import typing

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.dataset.imported import TRIPLET_TEXTS, ImportedPrompt, ImportReport, checked_pair, write_imported_run
from ip2p.dataset.names import HUGGINGFACE_COLUMNS, HUGGINGFACE_SPLITS
from ip2p.dataset.run_folder import Record
from ip2p.errors import DatasetError, InputError
from ip2p.schema import Triplet
from ip2p.storage import Folder


def import_huggingface(
    source: Folder, output: Folder, progress: typing.Callable[[int], object] = lambda prompts: None
) -> ImportReport:
    """Read every ``*.parquet`` below ``source``, in name order, and write a run to ``output``.

    A file whose path says train, validation or test keeps that split; other rows are split by the caption's hash.
    A row without a text or picture is in the report's problems. Raises InputError where there is no Parquet file, one
    lacks a column, or ``output`` holds something else.
    """
    names = [name for name in source.list() if name.endswith(".parquet")]
    if not names:
        raise InputError(f"{source.uri}: no .parquet file below it; pass the folder that holds the dataset's data/")
    rows = (row for name in names for row in _rows(source, name))
    groups = itertools.groupby(rows, key=lambda row: (row["split"], *(row[text] for text in TRIPLET_TEXTS)))
    prompts = (_prompt(list(group)) for _, group in groups)
    return write_imported_run(prompts, output, {"format": "hf", "source": source.uri}, progress)


def _open(source: Folder, name: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(pa.BufferReader(source.read(name)))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source.uri}/{name}: not a whole Parquet file ({error}); download it again") from error
    there = file.schema_arrow.names
    missing = [theirs for theirs in HUGGINGFACE_COLUMNS.values() if theirs not in there]
    if missing:
        found = f"no column {', '.join(missing)} (it has {', '.join(there)})"
        raise InputError(f"{source.uri}/{name}: {found}; rename its columns to the five")
    return file


def _rows(source: Folder, name: str) -> typing.Iterator[Record]:
    split, number = _split_in(name), 0
    for batch in _open(source, name).iter_batches(batch_size=64, columns=list(HUGGINGFACE_COLUMNS.values())):
        for record in batch.to_pylist():
            row = {ours: record[theirs] for ours, theirs in HUGGINGFACE_COLUMNS.items()}
            yield {**row, "split": split, "place": f"{name} row {number}"}
            number += 1


def _split_in(name: str) -> str:
    """Our name of the split that a path like ``data/validation-00000-of-00001.parquet`` names, or empty."""
    words = re.split(r"[/.\-_]", name)
    return next((ours for ours, theirs in HUGGINGFACE_SPLITS.items() if theirs in words or ours in words), "")


def _prompt(rows: list[Record]) -> ImportedPrompt:
    first = rows[0]
    if not all(isinstance(first[text], str) for text in TRIPLET_TEXTS):
        return ImportedPrompt(first["place"], Triplet("", "", ""), problems=("a text is missing",), readable=False)
    pairs, problems = [], []
    for seed, row in enumerate(rows):
        try:
            pairs.append(checked_pair(seed, _picture(row, "original_image"), _picture(row, "edited_image")))
        except DatasetError as error:
            problems.append(f"{row['place']}: {error}")
    triplet = Triplet(**{text: first[text] for text in TRIPLET_TEXTS})
    return ImportedPrompt(first["place"], triplet, tuple(pairs), tuple(problems), split=first["split"])


def _picture(row: Record, column: str) -> bytes:
    value = row[column]
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DatasetError(f"{HUGGINGFACE_COLUMNS[column]} holds no picture (a path alone is not enough)")
    return data
