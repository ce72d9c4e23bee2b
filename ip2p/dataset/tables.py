"""The two tables of a run: the ledger (one row a prompt, all its scores) and the pairs (one row a kept pair).

The paper's dataset keeps only survivors (section 3.1.2); the ledger also keeps every rejected candidate's scores, so
that thresholds can be changed later without painting again. This file knows columns, types and bytes; it knows no
folder (see run_folder.py) and no foreign name (see names.py).
"""

from __future__ import annotations

import dataclasses
import json
import typing

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.errors import DatasetError
from ip2p.schema import LedgerRow
from ip2p.seeds import unit_uniform

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SHARED_TEXT = pa.dictionary(pa.int32(), pa.string())
SPLITS = ("train", "val", "test")
SIMILARITIES = ("sim_original", "sim_edited", "sim_image", "sim_direction")
PROVENANCE = (
    "run_id", "recipe_sha256", "unet_sha256", "vae_sha256", "text_encoder_sha256", "clip_sha256",
)  # fmt: skip
ROWS_PER_GROUP = 100  # a reader that wants one row decodes at most this many pictures' bytes

CANDIDATE = pa.struct(
    [("seed", pa.uint64()), ("p2p_threshold", pa.float32()), ("guidance_scale", pa.float32())]
    + [(name, pa.float32()) for name in SIMILARITIES]
    + [("reason", pa.string())]
)
LEDGER_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("caption", pa.string()),
        ("instruction", pa.string()),
        ("edited_caption", pa.string()),
        ("task", pa.string()),
        ("url", pa.string()),
        ("n_candidates", pa.int32()),
        ("n_kept", pa.int32()),
        ("row_evals", pa.int64()),
        ("error", pa.string()),
        ("candidates", pa.list_(CANDIDATE)),
    ]
)


def with_image_features(schema: pa.Schema) -> pa.Schema:
    """``schema`` with the note by which Hugging Face ``datasets`` decodes its image columns. Flat columns only."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, str]:
    if kind == IMAGE:
        return {"_type": "Image"}
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return {"dtype": {"float": "float32"}.get(str(value), str(value)), "_type": "Value"}


PAIRS_SCHEMA = with_image_features(
    pa.schema(
        [
            ("pair_id", pa.string()),
            ("prompt_id", pa.string()),
            ("index", pa.int64()),
            ("rank", pa.int16()),
            ("seed", pa.uint64()),
            ("original_image", IMAGE),
            ("edited_image", IMAGE),
            ("caption", pa.string()),
            ("instruction", pa.string()),
            ("edited_caption", pa.string()),
            ("task", pa.string()),
            ("url", pa.string()),
            ("p2p_threshold", pa.float32()),
            ("guidance_scale", pa.float32()),
            ("sampler", pa.string()),
            ("steps", pa.int16()),
            ("p2p_mode", pa.string()),
            *[(name, pa.float32()) for name in SIMILARITIES],
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("split", pa.string()),
            *[(name, SHARED_TEXT) for name in PROVENANCE],
        ]
    )
)


def image_cell(data: bytes) -> dict[str, typing.Any]:
    """An encoded picture as the value of an image column."""
    return {"bytes": data, "path": None}


def split_of(caption: str) -> str:
    """``train``, ``val`` or ``test`` (90 / 5 / 5 %), decided by the caption alone.

    Case, spacing and final punctuation do not count. So all pairs of one caption share a split, and a caption keeps
    its split however much the dataset grows (the original cuts its list by position, and both can then leak).
    """
    chance = unit_uniform("split", " ".join(caption.casefold().split()).strip(" .!?"))
    return "train" if chance < 0.90 else "val" if chance < 0.95 else "test"


def ledger_record(row: LedgerRow) -> dict[str, typing.Any]:
    """``row`` as a record of the ledger table; the two counts are taken from its candidates."""
    flat = {name: getattr(row, name) for name in ("prompt_id", "index", "status", "reason", "row_evals", "error")}
    candidates = [dataclasses.asdict(candidate) for candidate in row.candidates]
    kept = sum(candidate["reason"] == "kept" for candidate in candidates)
    counts = {"n_candidates": len(candidates), "n_kept": kept}
    return {**flat, **dataclasses.asdict(row.triplet), **counts, "candidates": candidates}


def ledger_table(rows: typing.Sequence[dict[str, typing.Any]]) -> pa.Table:
    """Ledger records as a table of ``LEDGER_SCHEMA``, in the order given.

    Raises DatasetError where a record (or one of its candidates) lacks a column, has an unknown one, or holds a value
    of another type.
    """
    known = {field.name for field in CANDIDATE}
    for number, row in enumerate(rows):
        for candidate in row.get("candidates", ()):
            _check_names(candidate, known, f"a candidate of ledger row {number}")
    return _table(rows, LEDGER_SCHEMA, "ledger")


def pairs_table(rows: typing.Sequence[dict[str, typing.Any]]) -> pa.Table:
    """Pair records as a table of ``PAIRS_SCHEMA``, in the order given. A record without ``split`` gets its caption's.

    Unknown similarities are NaN. Raises DatasetError as ``ledger_table`` does, and for a split of another name.
    """
    filled = [row if "split" in row else {**row, "split": split_of(row["caption"])} for row in rows]
    for number, row in enumerate(filled):
        if row["split"] not in SPLITS:
            raise DatasetError(f"pairs row {number}: split is {row['split']!r}; it must be one of {', '.join(SPLITS)}")
    return _table(filled, PAIRS_SCHEMA, "pairs")


def _table(rows: typing.Sequence[dict[str, typing.Any]], schema: pa.Schema, what: str) -> pa.Table:
    for number, row in enumerate(rows):
        _check_names(row, set(schema.names), f"{what} row {number}")
    columns = [_column([row[field.name] for row in rows], field, what) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _check_names(record: dict[str, typing.Any], known: set[str], what: str) -> None:
    missing, unknown = sorted(known - record.keys()), sorted(record.keys() - known)
    if missing or unknown:
        raise DatasetError(f"{what}: missing columns {missing}, unknown columns {unknown}; see ip2p/dataset/tables.py")


def _column(values: list[typing.Any], field: pa.Field, what: str) -> pa.Array:
    if any(value is None for value in values):
        raise DatasetError(f"{what} column {field.name!r} has a row without a value; write '' or NaN for unknown")
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise DatasetError(f"{what} column {field.name!r} wants {field.type}: {error}") from error


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as one Parquet file. The same rows give the same bytes (for one version of pyarrow).

    Pictures are compressed already and are stored as they are; everything else is zstd.
    """
    leaves = [path for field in table.schema for path in _leaves(field.name, field.type)]
    columns = [path for path in leaves if not path.endswith(".bytes")]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=ROWS_PER_GROUP,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=columns,
        write_statistics=columns,
        compression=dict.fromkeys(columns, "zstd"),
        compression_level=dict.fromkeys(columns, 3),
    )
    return sink.getvalue().to_pybytes()


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """Parquet's own names for the flat columns below ``path``."""
    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    return [path]


def read_parquet_bytes(data: bytes, name: str = "a table", columns: list[str] | None = None) -> pa.Table:
    """The table in ``data``, or only some of its columns. Raises DatasetError, naming ``name``, if it is no Parquet."""
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{name}: not a whole Parquet file ({error}); make or copy it again") from error
