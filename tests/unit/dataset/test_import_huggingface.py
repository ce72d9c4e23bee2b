from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.dataset.export_huggingface import SCHEMA, export_huggingface
from ip2p.dataset.import_huggingface import import_huggingface
from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import iterate_pairs, shard_name, verify, write_shard
from ip2p.dataset.tables import SIMILARITIES, image_cell, ledger_record, split_of
from ip2p.errors import DatasetError, InputError
from ip2p.images import encode_image
from ip2p.storage import open_folder
from tests.ledgers import iterate_ledger


def foreign_row(caption="a hill", edit="add snow", value=9, **change):
    picture = image_cell(encode_image(np.full((8, 8, 3), value, np.uint8)))
    row = {
        "original_prompt": caption,
        "original_image": picture,
        "edit_prompt": edit,
        "edited_prompt": f"{caption}, {edit}",
        "edited_image": picture,
    }
    return {**row, **change}


@pytest.fixture
def foreign(tmp_path):
    """Write rows as one Parquet file of a foreign dataset and import the folder; gives report and run."""

    def go(rows, name="data/part-0.parquet", schema=SCHEMA):
        path = tmp_path / "hf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
        output = open_folder(str(tmp_path / "back"))
        return import_huggingface(open_folder(str(tmp_path / "hf")), output), output

    return go


def test_a_round_trip_keeps_texts_splits_ranks_and_every_picture_byte(ledger_row, pairs_of, tmp_path):
    run, rows = open_folder(str(tmp_path / "run")), [ledger_row(index, 2) for index in range(4)]
    splits = ["train", "val", "test", "train"]
    pairs = [{**pair, "split": split} for row, split in zip(rows, splits, strict=True) for pair in pairs_of(row)]
    write_manifest(run, write_shard(run, shard_name(0, ["r"]), [ledger_record(row) for row in rows], pairs))
    export_huggingface(run, open_folder(str(tmp_path / "hf")), pairs_per_file=3)  # cuts a prompt between two files
    back = open_folder(str(tmp_path / "back"))
    report = import_huggingface(open_folder(str(tmp_path / "hf")), back)
    assert (report.prompts, report.pairs, report.problems) == (4, 8, ())
    assert verify(back) == []
    names = ("caption", "instruction", "edited_caption", "split", "rank", "original_image", "edited_image")
    before, after = (
        sorted((pair["caption"], pair["rank"], [pair[name] for name in names]) for pair in iterate_pairs(folder))
        for folder in (run, back)
    )
    assert before == after


def test_what_the_columns_do_not_know_is_unknown(foreign):
    _, back = foreign([foreign_row()])
    pair, row = next(iterate_pairs(back)), next(iterate_ledger(back))
    assert all(math.isnan(pair[name]) for name in ("p2p_threshold", "guidance_scale", *SIMILARITIES))
    assert (pair["seed"], pair["steps"], pair["sampler"], pair["recipe_sha256"]) == (0, 0, "", "")
    assert (row["status"], row["n_kept"], row["candidates"][0]["reason"]) == ("accepted", 1, "kept")
    assert json.loads(back.read("summary.json"))["format"] == "hf"


def test_neighbours_with_the_same_texts_are_one_prompt(foreign):
    report, back = foreign([foreign_row(value=1), foreign_row(value=2), foreign_row("a lake"), foreign_row(value=3)])
    assert (report.prompts, report.pairs) == (3, 4)
    assert [(pair["index"], pair["rank"], pair["seed"]) for pair in iterate_pairs(back)] == [
        (0, 0, 0), (0, 1, 1), (1, 0, 0), (2, 0, 0),
    ]  # fmt: skip
    assert verify(back) == []


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/validation-00000-of-00001.parquet", "val"),
        ("default/test/0000.parquet", "test"),
        ("data/train-00000-of-00262-abc.parquet", "train"),
        ("data/contest.parquet", None),
    ],
)
def test_the_split_comes_from_the_path_or_else_from_the_caption(foreign, name, split):
    captions = [f"caption {number}" for number in (0, 2, 5)]  # train, val, test by hash
    _, back = foreign([foreign_row(caption) for caption in captions], name)
    assert [pair["split"] for pair in iterate_pairs(back)] == [split or split_of(caption) for caption in captions]


def test_the_same_texts_in_two_splits_stay_apart(foreign, tmp_path):
    (tmp_path / "hf").mkdir()
    pq.write_table(pa.Table.from_pylist([foreign_row(value=1)], SCHEMA), tmp_path / "hf/test.parquet")
    report, back = foreign([foreign_row(value=2)], "train.parquet")
    assert (report.prompts, report.pairs) == (2, 2)
    assert [pair["split"] for pair in iterate_pairs(back)] == ["test", "train"]


def test_rows_that_cannot_be_used_are_problems_with_file_and_row(foreign):
    rows = [
        foreign_row(),
        foreign_row("no text", edit_prompt=None),
        foreign_row("no picture", edited_image=None),
        foreign_row("by path", original_image={"bytes": None, "path": "somewhere.png"}),
        foreign_row("broken", edited_image=image_cell(b"\x89PNG....")),
        foreign_row("sizes", edited_image=image_cell(encode_image(np.zeros((4, 8, 3), np.uint8)))),
    ]
    report, back = foreign(rows)
    assert (report.prompts, report.pairs) == (6, 1)
    told = "\n".join(report.problems)
    for row, words in enumerate(
        [
            "a text is missing",
            "edited_image holds no picture",
            "original_image holds no picture",
            "the edited image cannot be decoded",
            "the original image is (8, 8) pixels and the edited one (8, 4)",
        ],
        start=1,
    ):
        assert f"data/part-0.parquet row {row}: " in report.problems[row - 1]
        assert words in told.splitlines()[row - 1]
    ledger = list(iterate_ledger(back))
    assert [row["status"] for row in ledger] == ["accepted"] + ["error"] * 5
    assert [row["reason"] for row in ledger] == ["ok", "bad_caption", "ok", "ok", "ok", "ok"]
    assert verify(back) == []


def test_plain_binary_pictures_and_further_columns_are_read(foreign):
    schema = pa.schema(
        [(f.name, pa.binary() if f.name.endswith("image") else f.type) for f in SCHEMA] + [("extra", pa.int64())]
    )
    row = foreign_row()
    plain = {name: value["bytes"] if name.endswith("image") else value for name, value in row.items()}
    report, back = foreign([{**plain, "extra": 1}], schema=schema)
    assert report.problems == ()
    assert next(iterate_pairs(back))["original_image"] == row["original_image"]


def test_other_columns_and_broken_files_are_refused_by_name(foreign, tmp_path):
    with pytest.raises(InputError, match=r"part-0\.parquet: no column original_prompt, original_image, edited_image"):
        foreign([{"input": "x", "edit_prompt": "y", "edited_prompt": "z"}], schema=None)
    (tmp_path / "hf/data/part-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"part-0\.parquet: not a whole Parquet file"):
        import_huggingface(open_folder(str(tmp_path / "hf")), open_folder(str(tmp_path / "back")))
    with pytest.raises(InputError, match=r"no \.parquet file below it"):
        import_huggingface(open_folder(str(tmp_path / "none")), open_folder(str(tmp_path / "back")))


def test_a_first_try_with_the_wrong_input_does_not_spoil_the_output(foreign, tmp_path):
    with pytest.raises(InputError):
        foreign([{"input": "x"}], schema=None)
    (tmp_path / "right").mkdir()
    pq.write_table(pa.Table.from_pylist([foreign_row()], SCHEMA), tmp_path / "right/train.parquet")
    report = import_huggingface(open_folder(str(tmp_path / "right")), open_folder(str(tmp_path / "back")))
    assert report.pairs == 1


def test_an_empty_dataset_is_refused(foreign):
    with pytest.raises(DatasetError, match="no usable pair; it holds no pictures"):
        foreign([])


def test_importing_twice_gives_the_same_bytes(foreign, tmp_path, tree_bytes):
    rows = [foreign_row(value=1), foreign_row("a lake")]
    foreign(rows)
    before = tree_bytes(tmp_path / "back")
    foreign(rows)
    assert tree_bytes(tmp_path / "back") == before
