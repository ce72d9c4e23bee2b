from __future__ import annotations

import collections
import math

import pyarrow as pa
import pytest

from ip2p.dataset.tables import (
    LEDGER_SCHEMA,
    PAIRS_SCHEMA,
    ledger_record,
    ledger_table,
    pairs_table,
    parquet_bytes,
    read_parquet_bytes,
    split_of,
)
from ip2p.errors import DatasetError


def test_ledger_round_trip_keeps_every_value_and_all_candidates(ledger_row):
    records = [ledger_record(ledger_row(0, 2)), ledger_record(ledger_row(1, 0))]
    table = read_parquet_bytes(parquet_bytes(ledger_table(records)))
    assert table.schema.equals(LEDGER_SCHEMA)
    rows = table.to_pylist()
    assert [row["n_candidates"] for row in rows] == [3, 1]
    assert [row["n_kept"] for row in rows] == [2, 0]
    assert [row["status"] for row in rows] == ["accepted", "exhausted"]
    assert rows[0]["caption"] == "a boat, number 0"
    assert rows[0]["row_evals"] == 320
    assert [c["reason"] for c in rows[0]["candidates"]] == ["kept", "kept", "below_image"]
    assert rows[0]["candidates"][2]["seed"] == records[0]["candidates"][2]["seed"]
    assert rows[0]["candidates"][1]["sim_direction"] == pytest.approx(0.35)


def test_pairs_round_trip_keeps_types_pictures_and_shared_texts(ledger_row, pairs_of):
    pairs = pairs_of(ledger_row(3, 2))
    table = read_parquet_bytes(parquet_bytes(pairs_table(pairs)))
    assert table.schema.equals(PAIRS_SCHEMA)
    assert pa.types.is_dictionary(table.schema.field("unet_sha256").type)
    rows = table.to_pylist()
    assert rows[1]["original_image"] == pairs[1]["original_image"]
    assert rows[1]["seed"] == pairs[1]["seed"]
    assert rows[1]["clip_sha256"] == "abc"
    assert {row["split"] for row in rows} == {split_of("a boat, number 3")}


def test_an_empty_pairs_table_keeps_its_columns():
    table = read_parquet_bytes(parquet_bytes(pairs_table([])))
    assert (table.num_rows, table.schema.names) == (0, PAIRS_SCHEMA.names)


def test_the_largest_seed_survives(ledger_row, pairs_of):
    pairs = [{**pairs_of(ledger_row(0, 1))[0], "seed": 2**64 - 1}]
    assert read_parquet_bytes(parquet_bytes(pairs_table(pairs)))["seed"].to_pylist() == [2**64 - 1]


def test_the_same_rows_give_the_same_bytes_and_another_order_does_not(ledger_row, pairs_of):
    pairs = [{**pair, "run_id": f"run {pair['rank']}"} for pair in pairs_of(ledger_row(0, 3))]
    first = parquet_bytes(pairs_table(pairs))
    assert parquet_bytes(pairs_table([dict(reversed(pair.items())) for pair in pairs])) == first
    chunked = pa.concat_tables([pairs_table(pairs[:1]), pairs_table(pairs[1:])])
    assert parquet_bytes(chunked) == first
    assert parquet_bytes(pairs_table(pairs[::-1])) != first


def test_pictures_lie_in_the_file_uncompressed_and_texts_compressed(ledger_row, pairs_of):
    pairs = pairs_of(ledger_row(0, 3))
    data = parquet_bytes(pairs_table(pairs))
    assert data.count(pairs[0]["original_image"]["bytes"]) == 1
    group = pa.parquet.read_metadata(pa.BufferReader(data)).row_group(0)
    codecs = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert {path for path, codec in codecs.items() if codec == "UNCOMPRESSED"} == {
        "original_image.bytes",
        "edited_image.bytes",
    }
    ledger = parquet_bytes(ledger_table([ledger_record(ledger_row(0, 3))]))
    group = pa.parquet.read_metadata(pa.BufferReader(ledger)).row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_long_tables_are_cut_into_row_groups_of_a_hundred(ledger_row):
    records = [{**ledger_record(ledger_row(0, 0)), "index": index} for index in range(250)]
    metadata = pa.parquet.read_metadata(pa.BufferReader(parquet_bytes(ledger_table(records))))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [100, 100, 50]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg_scale": 7.5}, "unknown columns ['cfg_scale']"),
        ({"steps": "twenty"}, "column 'steps' wants int16"),
        ({"steps": 70000}, "column 'steps' wants int16"),
        ({"url": None}, "column 'url' has a row without a value"),
        ({"split": "dev"}, "split is 'dev'; it must be one of train, val, test"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_by_column(ledger_row, pairs_of, change, message):
    pair = {**pairs_of(ledger_row(0, 1))[0], **change}
    with pytest.raises(DatasetError) as caught:
        pairs_table([pair])
    assert message in str(caught.value)


def test_a_missing_column_and_a_misnamed_score_are_refused(ledger_row):
    record = ledger_record(ledger_row(0, 1))
    with pytest.raises(DatasetError, match=r"ledger row 0: missing columns \['error'\]"):
        ledger_table([{name: value for name, value in record.items() if name != "error"}])
    record["candidates"][0]["clip_sim_0"] = record["candidates"][0].pop("sim_original")
    with pytest.raises(DatasetError, match=r"a candidate of ledger row 0: missing columns \['sim_original'\]"):
        ledger_table([record])


def test_a_cut_parquet_file_is_refused_by_name(ledger_row):
    data = parquet_bytes(ledger_table([ledger_record(ledger_row(0, 1))]))
    with pytest.raises(DatasetError, match="ledger/part-00000: not a whole Parquet file"):
        read_parquet_bytes(data[:-20], "ledger/part-00000")


def test_splits_are_near_90_5_5_and_never_change():
    counts = collections.Counter(split_of(f"caption {number}") for number in range(20_000))
    assert abs(counts["train"] - 18_000) < 130  # three standard deviations of a fair draw
    assert abs(counts["val"] - 1_000) < 95
    assert abs(counts["test"] - 1_000) < 95
    assert [split_of(f"caption {number}") for number in (0, 2, 5)] == ["train", "val", "test"]


def test_captions_that_differ_in_case_spacing_or_final_point_share_a_split():
    outside = next(f"A boat {n}" for n in range(1000) if split_of(f"A boat {n}") == "test")
    for variant in (outside.lower(), f"  {outside}.", outside.replace(" ", "  "), f"{outside} !"):
        assert split_of(variant) == "test"


def test_datasets_decodes_the_pictures_of_a_pairs_file(ledger_row, pairs_of, tmp_path):
    import numpy as np
    from datasets import load_dataset

    from ip2p.images import decode_image

    pairs = [{**pair, "sim_image": math.nan} for pair in pairs_of(ledger_row(0, 2))]
    (tmp_path / "part.parquet").write_bytes(parquet_bytes(pairs_table(pairs)))
    loaded = load_dataset("parquet", data_files=str(tmp_path / "part.parquet"), cache_dir=str(tmp_path / "cache"))
    row = loaded["train"][1]
    assert np.array_equal(np.asarray(row["edited_image"]), decode_image(pairs[1]["edited_image"]["bytes"]))
    assert (row["seed"], row["run_id"]) == (pairs[1]["seed"], "abc")
