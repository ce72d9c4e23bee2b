from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p.dataset.export_original import export_original
from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import iterate_pairs, shard_name, write_shard
from ip2p.dataset.tables import ledger_record
from ip2p.errors import DatasetError, InputError
from ip2p.images import decode_image
from ip2p.storage import open_folder


class OriginalReader:
    """Behaves as the released code's ``EditDataset`` does when it opens a folder: nothing but what it reads."""

    def __init__(self, path, split="train", fractions=(0.9, 0.05, 0.05)):
        self.path = Path(path)
        bounds = {
            "train": (0.0, fractions[0]),
            "val": (fractions[0], fractions[0] + fractions[1]),
            "test": (fractions[0] + fractions[1], 1.0),
        }[split]
        listing = json.loads((self.path / "seeds.json").read_text())
        first, last = (math.floor(bound * len(listing)) for bound in bounds)
        self.listing = listing[first:last]

    def __len__(self):
        return len(self.listing)

    def item(self, number, which_seed=0, caption_key="input"):
        name, seeds = self.listing[number]
        prompt = json.loads((self.path / name / "prompt.json").read_text())
        images = [Image.open(self.path / name / f"{seeds[which_seed]}_{which}.jpg") for which in (0, 1)]
        return prompt[caption_key], prompt["edit"], prompt["output"], *images


@pytest.fixture
def tree(run, tmp_path):
    export_original(run, open_folder(str(tmp_path / "tree")))
    return tmp_path / "tree"


def test_the_original_reader_loads_every_prompt_with_its_texts_and_pictures(run, tree):
    pairs = {str(pair["seed"]): pair for pair in iterate_pairs(run)}
    reader = OriginalReader(tree, fractions=(1.0, 0.0, 0.0))
    assert len(reader) == 4
    met = set()
    for number, (_, seeds) in enumerate(reader.listing):
        for which, seed in enumerate(seeds):
            caption, edit, output, original, edited = reader.item(number, which)
            pair = pairs[seed]
            assert (caption, edit, output) == (pair["caption"], pair["instruction"], pair["edited_caption"])
            assert reader.item(number, which, "caption")[0] == pair["caption"]
            for picture, column in ((original, "original_image"), (edited, "edited_image")):
                ours = decode_image(pair[column]["bytes"]).astype(int)
                assert np.abs(np.asarray(picture).astype(int) - ours).max() <= 4
            met.add(seed)
    assert met == set(pairs)


def test_directories_hold_exactly_the_original_files(run, tree):
    pairs = [pair for pair in iterate_pairs(run) if pair["index"] == 3]
    directory = next(d for d in tree.iterdir() if d.is_dir() and "number 3" in (d / "prompt.json").read_text())
    pictures = {f"{pair['seed']}_{number}.jpg" for pair in pairs for number in (0, 1)}
    assert {path.name for path in directory.iterdir()} == {"prompt.json", "metadata.jsonl", *pictures}
    assert json.loads((directory / "prompt.json").read_text()) == {
        "caption": "a boat, number 3",
        "input": "a boat, number 3",
        "edit": "make it night",
        "output": "a boat at night, number 3",
        "url": "u://3",
    }
    lines = [json.loads(line) for line in (directory / "metadata.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "seed": pairs[1]["seed"],
        "p2p_threshold": 0.2,
        "cfg_scale": 8.5,
        "clip_sim_0": 0.22,
        "clip_sim_1": 0.32,
        "clip_sim_dir": 0.35,
        "clip_sim_image": 0.71,
    }
    assert [line["seed"] for line in lines] == [pair["seed"] for pair in pairs]


def test_seeds_are_decimal_texts_sorted_by_directory_and_name(tree):
    listing = json.loads((tree / "seeds.json").read_text())
    assert [name for name, _ in listing] == ["0000000", "0000001", "0000002", "0000003"]
    for name, seeds in listing:
        assert seeds == sorted(path.name.split("_")[0] for path in (tree / name).glob("*_0.jpg"))


def test_a_prompt_without_pairs_has_no_directory(tree):
    assert not any("number 1" in path.read_text() for path in tree.glob("*/prompt.json"))
    assert len(list(tree.glob("*/prompt.json"))) == 4


def test_pictures_keep_full_colour_at_quality_100(tree):
    with Image.open(next(tree.glob("*/*_0.jpg"))) as picture:
        assert {(layer[1], layer[2]) for layer in picture.layer} == {(1, 1)}
        assert max(map(max, picture.quantization.values())) == 1


def test_a_run_that_stores_jpeg_keeps_its_bytes(build_run, tmp_path):
    run = build_run(kept=(1,), image_format="jpeg")
    export_original(run, open_folder(str(tmp_path / "tree")))
    pair = next(iterate_pairs(run))
    written = (tmp_path / "tree" / "0000000" / f"{pair['seed']}_1.jpg").read_bytes()
    assert written == pair["edited_image"]["bytes"]


def test_the_positional_cut_falls_near_ours(ledger_row, pairs_of, tmp_path):
    folder = open_folder(str(tmp_path / "run"))
    template = pairs_of(ledger_row(0, 1))[0]
    splits = ["test", "train", "val", "train"] * 2 + ["train"] * 32  # 36 train, 2 val, 2 test
    rows = [ledger_row(index, 1) for index in range(40)]
    pairs = [
        {**template, "prompt_id": row.prompt_id, "pair_id": f"p{index}", "index": index, "split": split}
        for index, (row, split) in enumerate(zip(rows, splits, strict=True))
    ]
    files = write_shard(folder, shard_name(0, ["all"]), [ledger_record(row) for row in rows], pairs[::-1])
    write_manifest(folder, files)
    counts = export_original(folder, open_folder(str(tmp_path / "tree")))
    assert counts == {"prompts": 40, "pairs": 40, "train": 36, "val": 2, "test": 2, "in_another_split": 0}
    assert [len(OriginalReader(tmp_path / "tree", split)) for split in ("train", "val", "test")] == [36, 2, 2]


def test_prompts_beyond_the_positional_cut_are_counted(run, tmp_path):
    counts = export_original(run, open_folder(str(tmp_path / "tree")))
    assert counts == {"prompts": 4, "pairs": 7, "train": 7, "val": 0, "test": 0, "in_another_split": 1}
    assert [len(OriginalReader(tmp_path / "tree", split)) for split in ("train", "val", "test")] == [3, 0, 1]


def test_exporting_twice_leaves_the_same_tree(run, tree, tree_bytes):
    before = tree_bytes(tree)
    export_original(run, open_folder(str(tree)))
    assert tree_bytes(tree) == before


def test_an_export_cut_short_is_finished_by_running_it_again(run, tree, tree_bytes, tmp_path, monkeypatch):
    output = open_folder(str(tmp_path / "cut"))
    write = type(output).write

    def stop_late(self, name, data):
        if name == "0000002/metadata.jsonl":
            raise KeyboardInterrupt
        write(self, name, data)

    monkeypatch.setattr(type(output), "write", stop_late)
    with pytest.raises(KeyboardInterrupt):
        export_original(run, output)
    monkeypatch.undo()
    assert not output.exists("seeds.json")
    export_original(run, output)
    assert tree_bytes(tmp_path / "cut") == tree_bytes(tree)


def test_another_run_may_not_be_mixed_in(tree, build_run):
    with pytest.raises(InputError, match="holds something else"):
        export_original(build_run(kept=(1,)), open_folder(str(tree)))


def test_a_folder_of_other_files_is_not_written_to(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.txt"):
        export_original(run, open_folder(str(tmp_path)))


def test_a_run_that_kept_nothing_is_refused(build_run, tmp_path):
    with pytest.raises(DatasetError, match="no pair was kept"):
        export_original(build_run(kept=(0, 0)), open_folder(str(tmp_path / "tree")))
    assert not (tmp_path / "tree").exists()


def test_an_unknown_score_is_null_not_nan(ledger_row, pairs_of, tmp_path):
    folder, row = open_folder(str(tmp_path / "run")), ledger_row(0, 1)
    pairs = [{**pair, "sim_image": math.nan} for pair in pairs_of(row)]
    write_manifest(folder, write_shard(folder, shard_name(0, ["a"]), [ledger_record(row)], pairs))
    export_original(folder, open_folder(str(tmp_path / "tree")))
    text = (tmp_path / "tree/0000000/metadata.jsonl").read_text()
    assert '"clip_sim_image": null' in text
    assert "NaN" not in text


def test_two_pairs_of_one_seed_are_refused_rather_than_lost(ledger_row, pairs_of, tmp_path):
    folder, row = open_folder(str(tmp_path / "run")), ledger_row(0, 2)
    pairs = [{**pair, "seed": 5} for pair in pairs_of(row)]
    write_manifest(folder, write_shard(folder, shard_name(0, ["a"]), [ledger_record(row)], pairs))
    with pytest.raises(DatasetError, match="two pairs have one seed"):
        export_original(folder, open_folder(str(tmp_path / "tree")))


def test_progress_counts_every_pair(run, tmp_path):
    told = []
    export_original(run, open_folder(str(tmp_path / "tree")), told.append)
    assert told == [2, 1, 3, 1]


def test_a_jpeg_written_here_is_whole(tree):
    for path in tree.glob("*/*.jpg"):
        assert decode_image(io.BytesIO(path.read_bytes()).getvalue()).shape == (16, 24, 3)
