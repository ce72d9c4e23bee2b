from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ip2p.dataset.export_huggingface import export_huggingface
from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import iterate_pairs, shard_name, write_shard
from ip2p.dataset.tables import ledger_record
from ip2p.errors import DatasetError, InputError
from ip2p.images import decode_image
from ip2p.storage import open_folder

FIVE = ["original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"]


@pytest.fixture
def spread_run(ledger_row, pairs_of, tmp_path):
    """Six prompts of two pairs each: four train, one val, one test. Pairs lie worst rank first."""
    folder = open_folder(str(tmp_path / "spread"))
    rows = [ledger_row(index, 2) for index in range(6)]
    splits = ["train", "val", "train", "test", "train", "train"]
    pairs = [
        {**pair, "split": split} for row, split in zip(rows, splits, strict=True) for pair in reversed(pairs_of(row))
    ]
    write_manifest(folder, write_shard(folder, shard_name(0, ["s"]), [ledger_record(row) for row in rows], pairs))
    return folder


def load(path, tmp_path):
    from datasets import load_dataset

    return load_dataset(str(path), cache_dir=str(tmp_path / "cache"))


def test_datasets_loads_the_folder_with_five_columns_and_three_splits(spread_run, tmp_path):
    counts = export_huggingface(spread_run, open_folder(str(tmp_path / "hf")), pairs_per_file=3)
    assert counts == {"prompts": 6, "pairs": 12, "train": 8, "val": 2, "test": 2}
    loaded = load(tmp_path / "hf", tmp_path)
    assert {name: len(split) for name, split in loaded.items()} == {"train": 8, "validation": 2, "test": 2}
    assert loaded["train"].column_names == FIVE
    ours = [pair for pair in iterate_pairs(spread_run) if pair["split"] == "test"]
    best = min(ours, key=lambda pair: pair["rank"])
    row = loaded["test"][0]
    assert (row["original_prompt"], row["edit_prompt"]) == (best["caption"], best["instruction"])
    assert row["edited_prompt"] == best["edited_caption"]
    for column in ("original_image", "edited_image"):
        assert np.array_equal(np.asarray(row[column].convert("RGB")), decode_image(best[column]["bytes"]))


def test_files_are_named_by_split_number_and_total(spread_run, tmp_path):
    export_huggingface(spread_run, open_folder(str(tmp_path / "hf")), pairs_per_file=3)
    sizes = {path.name: pq.read_metadata(path).num_rows for path in (tmp_path / "hf/data").iterdir()}
    assert sizes == {
        "train-00000-of-00003.parquet": 3,
        "train-00001-of-00003.parquet": 3,
        "train-00002-of-00003.parquet": 2,
        "validation-00000-of-00001.parquet": 2,
        "test-00000-of-00001.parquet": 2,
    }


def test_one_pair_a_prompt_takes_the_best(spread_run, tmp_path):
    counts = export_huggingface(spread_run, open_folder(str(tmp_path / "hf")), "one")
    assert counts == {"prompts": 6, "pairs": 6, "train": 4, "val": 1, "test": 1}
    table = pq.read_table(tmp_path / "hf/data/train-00000-of-00001.parquet")
    best = [p for p in iterate_pairs(spread_run) if p["rank"] == 0 and p["split"] == "train"]
    assert [cell["bytes"] for cell in table["edited_image"].to_pylist()] == [p["edited_image"]["bytes"] for p in best]
    assert "6 pairs of 6 prompts (one per prompt)" in (tmp_path / "hf/README.md").read_text()


def test_a_split_without_pairs_has_no_file_and_no_line_in_the_card(run, tmp_path):
    export_huggingface(run, open_folder(str(tmp_path / "hf")))
    assert [path.name for path in (tmp_path / "hf/data").iterdir()] == ["train-00000-of-00001.parquet"]
    assert "test" not in (tmp_path / "hf/README.md").read_text().split("# Image")[0]
    assert {name: len(split) for name, split in load(tmp_path / "hf", tmp_path).items()} == {"train": 7}


def test_the_columns_are_what_the_diffusers_trainer_reads(run, tmp_path):
    """train_instruct_pix2pix.py: --original_image_column original_image, and its defaults for the other two."""
    export_huggingface(run, open_folder(str(tmp_path / "hf")))
    batch = load(tmp_path / "hf", tmp_path)["train"][:2]
    for column in ("original_image", "edited_image"):
        assert [picture.convert("RGB").resize((8, 8)).size for picture in batch[column]] == [(8, 8)] * 2
    assert batch["edit_prompt"] == ["make it night"] * 2


def test_the_card_tells_features_splits_and_files(spread_run, tmp_path):
    import yaml

    export_huggingface(spread_run, open_folder(str(tmp_path / "hf")))
    card = yaml.safe_load((tmp_path / "hf/README.md").read_text().split("---")[1])
    kinds = {feature["name"]: feature["dtype"] for feature in card["dataset_info"]["features"]}
    assert kinds == {name: "image" if name.endswith("image") else "string" for name in FIVE}
    assert [split["num_examples"] for split in card["dataset_info"]["splits"]] == [8, 2, 2]
    assert [file["split"] for file in card["configs"][0]["data_files"]] == ["train", "validation", "test"]


def test_exporting_twice_leaves_the_same_files(run, tmp_path, tree_bytes):
    output = open_folder(str(tmp_path / "hf"))
    export_huggingface(run, output)
    before = tree_bytes(tmp_path / "hf")
    export_huggingface(run, output)
    assert tree_bytes(tmp_path / "hf") == before
    assert json.loads(before["export.json"])["format"] == "hf"


def test_other_options_may_not_be_mixed_in(run, tmp_path):
    export_huggingface(run, open_folder(str(tmp_path / "hf")))
    with pytest.raises(InputError, match="holds something else"):
        export_huggingface(run, open_folder(str(tmp_path / "hf")), "one")


def test_bad_options_and_empty_runs_are_refused(run, build_run, tmp_path):
    output = open_folder(str(tmp_path / "hf"))
    with pytest.raises(InputError, match="all or one, got 'two'"):
        export_huggingface(run, output, "two")
    with pytest.raises(DatasetError, match="no pair was kept"):
        export_huggingface(build_run(kept=(0,)), output)


def test_progress_counts_every_pair(run, tmp_path):
    told = []
    export_huggingface(run, open_folder(str(tmp_path / "hf")), progress=told.append)
    assert sum(told) == 7
