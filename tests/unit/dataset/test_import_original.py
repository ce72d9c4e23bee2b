from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from ip2p.dataset.export_original import export_original
from ip2p.dataset.import_original import import_original
from ip2p.dataset.run_folder import iterate_pairs, verify
from ip2p.dataset.tables import SIMILARITIES, split_of
from ip2p.errors import DatasetError, InputError, StorageError
from ip2p.images import decode_image
from ip2p.storage import LocalFolder, open_folder
from tests.ledgers import iterate_ledger

NUMBERS = ("seed", "p2p_threshold", "guidance_scale", *SIMILARITIES)


@pytest.fixture
def tree(run, tmp_path):
    export_original(run, open_folder(str(tmp_path / "tree")))
    return tmp_path / "tree"


@pytest.fixture
def bring(tree, tmp_path):
    """Import ``tree`` as it is now; gives the report and the new run."""

    def go(name="back"):
        output = open_folder(str(tmp_path / name))
        return import_original(open_folder(str(tree)), output), output

    return go


def as_original_writer(tree):
    """What the original's own scripts leave: only ``caption``, an appended-to metadata file, no seeds.json."""
    (tree / "seeds.json").unlink()
    for path in tree.glob("*/prompt.json"):
        texts = json.loads(path.read_text())
        path.write_text(json.dumps({key: texts[key] for key in ("caption", "edit", "output", "url")}))


def test_a_round_trip_keeps_texts_scores_and_ranks(run, bring):
    report, back = bring()
    assert (report.prompts, report.pairs, report.problems) == (4, 7, ())
    assert verify(back) == []
    ours, theirs = ({pair["seed"]: pair for pair in iterate_pairs(folder)} for folder in (run, back))
    assert ours.keys() == theirs.keys()
    for seed, pair in ours.items():
        names = ("caption", "instruction", "edited_caption", "url", "rank", "width", "height", "split", *NUMBERS)
        assert {name: theirs[seed][name] for name in names} == {name: pair[name] for name in names}
        for column in ("original_image", "edited_image"):
            before, after = (decode_image(side[seed][column]["bytes"]).astype(int) for side in (ours, theirs))
            assert np.abs(before - after).max() <= 4


def test_a_second_round_trip_keeps_every_picture_byte(bring, tmp_path):
    _, back = bring()
    export_original(back, open_folder(str(tmp_path / "tree2")))
    import_original(open_folder(str(tmp_path / "tree2")), open_folder(str(tmp_path / "back2")))
    first, second = (list(iterate_pairs(open_folder(str(tmp_path / name)))) for name in ("back", "back2"))
    assert first == second


def test_the_ledger_of_an_import_holds_what_the_tree_knows(bring):
    _, back = bring()
    rows = list(iterate_ledger(back))
    assert [row["status"] for row in rows] == ["accepted"] * 4
    assert [row["n_kept"] for row in rows] == [row["n_candidates"] for row in rows] == [2, 1, 3, 1]
    assert rows[2]["candidates"][1]["sim_direction"] == pytest.approx(0.35)
    assert {c["reason"] for row in rows for c in row["candidates"]} == {"kept"}
    summary = json.loads(back.read("summary.json"))
    assert (summary["format"], summary["prompts"], summary["pairs"]) == ("original", {"accepted": 4}, 7)
    assert not back.exists("recipe.json")


def test_a_tree_of_the_original_writer_is_read_without_seeds_json(tree, bring):
    as_original_writer(tree)
    report, back = bring()
    assert (report.prompts, report.pairs, report.problems) == (4, 7, ())
    assert next(iterate_pairs(back))["caption"] == "a boat, number 0"


def test_a_published_tree_with_input_and_nested_shards_is_read(tree, bring):
    nested = tree / "shard-00"
    nested.mkdir()
    for directory in list(tree.glob("000*")):
        directory.rename(nested / directory.name)
    for path in tree.glob("*/*/prompt.json"):
        texts = json.loads(path.read_text())
        path.write_text(json.dumps({key: texts[key] for key in ("input", "edit", "output")}))
    (tree / "seeds.json").unlink()
    report, back = bring()
    assert (report.prompts, report.pairs, report.problems) == (4, 7, ())
    pair = next(iterate_pairs(back))
    assert (pair["caption"], pair["url"]) == ("a boat, number 0", "")


def test_a_directory_with_only_its_prompt_is_an_exhausted_prompt(tree, bring):
    as_original_writer(tree)
    (tree / "0000009").mkdir()
    (tree / "0000009" / "prompt.json").write_text(json.dumps({"caption": "a", "edit": "b", "output": "c"}))
    report, back = bring()
    assert (report.prompts, report.problems) == (5, ())
    row = list(iterate_ledger(back))[-1]
    assert (row["status"], row["reason"], row["caption"], row["n_kept"]) == ("exhausted", "ok", "a", 0)


def test_a_missing_second_picture_is_a_problem_and_the_others_come_in(tree, bring):
    seeds = json.loads((tree / "seeds.json").read_text())[2][1]
    (tree / "0000002" / f"{seeds[0]}_1.jpg").unlink()
    report, back = bring()
    assert report.problems == (f"0000002: seed {seeds[0]}: {seeds[0]}_1.jpg is missing",)
    assert report.pairs == 6
    row = list(iterate_ledger(back))[2]
    assert (row["status"], row["n_kept"], row["error"]) == ("accepted", 2, report.problems[0][9:])
    assert verify(back) == []


def test_a_missing_first_picture_is_seen_without_seeds_json_too(tree, bring):
    as_original_writer(tree)
    path = next((tree / "0000001").glob("*_0.jpg"))
    path.unlink()
    report, back = bring()
    assert report.problems == (f"0000001: seed {path.name[:-6]}: {path.name} is missing",)
    row = list(iterate_ledger(back))[1]
    assert (row["status"], row["caption"]) == ("error", "a boat, number 2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "0000001: prompt.json is missing"),
        ("{", "0000001: prompt.json is not JSON"),
        ("[]", "0000001: prompt.json is not a JSON object"),
        ('{"edit": "b", "output": "c"}', "0000001: prompt.json has no text under caption or input"),
        ('{"input": "a", "edit": 3, "output": "c"}', "0000001: prompt.json has no text under edit"),
    ],
)
def test_an_unreadable_prompt_is_a_ledger_row_with_its_reason(tree, bring, text, problem):
    path = tree / "0000001" / "prompt.json"
    path.unlink() if text is None else path.write_text(text)
    report, back = bring()
    assert len(report.problems) == 1
    assert report.problems[0].startswith(problem)
    assert (report.prompts, report.pairs) == (4, 6)
    row = list(iterate_ledger(back))[1]
    assert (row["status"], row["reason"]) == ("error", "bad_caption")
    assert row["error"] == report.problems[0][9:]
    assert verify(back) == []


def test_a_listed_directory_that_is_gone_or_outside_is_a_problem(tree, bring):
    listing = json.loads((tree / "seeds.json").read_text())
    shutil.rmtree(tree / "0000000")
    listing.append(["../tree/0000002", ["1"]])
    (tree / "seeds.json").write_text(json.dumps(listing))
    report, _ = bring()
    assert report.problems == (
        "0000000: prompt.json is missing",
        "../tree/0000002: the directory lies outside the tree",
    )


def test_a_truncated_picture_and_a_strange_seed_are_problems(tree, bring):
    listing = json.loads((tree / "seeds.json").read_text())
    first = tree / "0000000" / f"{listing[0][1][0]}_0.jpg"
    first.write_bytes(first.read_bytes()[:-100])
    listing[1][1] += ["-3", str(2**64)]
    (tree / "seeds.json").write_text(json.dumps(listing))
    report, _ = bring()
    assert len(report.problems) == 3
    assert "the original image cannot be decoded" in report.problems[0]
    assert report.problems[1] == "0000001: seed -3: is not a whole number of at most 64 bits"
    assert f"seed {2**64}: is not a whole number" in report.problems[2]


def test_rerun_metadata_counts_once_and_the_last_line_holds(tree, bring):
    path = tree / "0000001" / "metadata.jsonl"
    line = json.loads(path.read_text())
    path.write_text(path.read_text() + json.dumps({**line, "clip_sim_dir": 0.9}) + "\n" + '{"seed": 5, "cl')
    report, back = bring()
    pair = next(pair for pair in iterate_pairs(back) if pair["index"] == 1)
    assert pair["sim_direction"] == pytest.approx(0.9)
    assert len(report.problems) == 1
    assert report.problems[0].startswith("0000001: metadata.jsonl line 3 cannot be read")


def test_without_metadata_scores_are_unknown_not_zero(tree, bring):
    for path in tree.glob("*/metadata.jsonl"):
        path.unlink()
    report, back = bring()
    assert report.problems == ()
    for pair in iterate_pairs(back):
        assert all(math.isnan(pair[name]) for name in NUMBERS[1:])
        assert (pair["sampler"], pair["steps"], pair["unet_sha256"]) == ("", 0, "")


def test_pairs_are_ranked_by_direction_and_unknown_ones_last(tree, bring):
    path = tree / "0000002" / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["clip_sim_dir"], lines[1]["clip_sim_dir"], lines[2]["clip_sim_dir"] = None, 0.3, 0.6
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, back = bring()
    ranked = [pair for pair in iterate_pairs(back) if pair["index"] == 2]
    assert [pair["seed"] for pair in ranked] == [lines[2]["seed"], lines[1]["seed"], lines[0]["seed"]]
    assert report.problems == ()
    assert math.isnan(ranked[2]["sim_direction"])
    assert ranked[2]["sim_image"] == pytest.approx(0.7)


def test_a_seed_listed_twice_is_one_pair(tree, bring):
    listing = json.loads((tree / "seeds.json").read_text())
    listing[1][1] *= 2
    (tree / "seeds.json").write_text(json.dumps(listing))
    report, back = bring()
    assert report.pairs == 7
    assert verify(back) == []


def test_equal_directions_keep_the_order_of_the_metadata(tree, bring):
    path = tree / "0000002" / "metadata.jsonl"
    lines = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: -line["seed"])
    path.write_text("".join(json.dumps({**line, "clip_sim_dir": 0.5}) + "\n" for line in lines))
    _, back = bring()
    ranked = [pair["seed"] for pair in iterate_pairs(back) if pair["index"] == 2]
    assert ranked == [line["seed"] for line in lines]


def test_splits_follow_the_caption_not_the_position(tree, bring):
    outside = next(f"a hill {n}" for n in range(1000) if split_of(f"a hill {n}") == "val")
    path = tree / "0000000" / "prompt.json"
    path.write_text(json.dumps({"caption": outside, "edit": "b", "output": "c"}))
    _, back = bring()
    assert [pair["split"] for pair in iterate_pairs(back)] == ["val"] * 2 + ["train"] * 5


def test_importing_twice_gives_the_same_bytes(bring, tmp_path, tree_bytes):
    bring()
    before = tree_bytes(tmp_path / "back")
    bring()
    assert tree_bytes(tmp_path / "back") == before
    bring("elsewhere")
    assert tree_bytes(tmp_path / "elsewhere") == before


def test_importing_a_changed_tree_again_leaves_only_the_new_run(tree, bring):
    bring()
    listing = json.loads((tree / "seeds.json").read_text())
    (tree / "seeds.json").write_text(json.dumps(listing[1:]))
    report, back = bring()
    assert (report.prompts, report.pairs) == (3, 5)
    assert verify(back) == []


def test_importing_again_and_being_cut_off_leaves_no_finished_run(bring, tmp_path, monkeypatch, tree_bytes):
    bring()
    before, write = tree_bytes(tmp_path / "back"), LocalFolder.write

    def cut(self, name, data):
        if name.startswith("ledger/"):
            raise StorageError("the disk is full")
        write(self, name, data)

    monkeypatch.setattr(LocalFolder, "write", cut)
    with pytest.raises(StorageError):
        bring()
    monkeypatch.undo()
    assert "has not finished" in verify(open_folder(str(tmp_path / "back")))[0]
    bring()
    assert tree_bytes(tmp_path / "back") == before


def test_many_prompts_are_cut_into_shards(tree, bring, monkeypatch):
    monkeypatch.setattr("ip2p.dataset.imported.PROMPTS_PER_SHARD", 3)
    _, back = bring()
    assert [name[:17] for name in back.list("pairs/")] == ["pairs/part-00000-", "pairs/part-00001-"]
    assert [row["index"] for row in iterate_ledger(back)] == [0, 1, 2, 3]
    assert verify(back) == []


def test_progress_counts_prompts(tree, tmp_path):
    told = []
    import_original(open_folder(str(tree)), open_folder(str(tmp_path / "back")), told.append)
    assert told == [4]


def test_a_folder_without_prompts_and_a_broken_list_are_refused(tree, tmp_path):
    output = open_folder(str(tmp_path / "back"))
    with pytest.raises(InputError, match=r"no seeds\.json and no directory with prompt\.json"):
        import_original(open_folder(str(tmp_path / "nothing")), output)
    for text in ('{"a": 1', "[1, 2]", '[["0000000"]]'):
        (tree / "seeds.json").write_text(text)
        with pytest.raises(InputError, match=r"not a list of \[directory, \[seeds\]\]"):
            import_original(open_folder(str(tree)), output)


def test_a_tree_without_one_usable_pair_is_refused_with_its_first_problem(tree, bring):
    for path in tree.glob("*/*_1.jpg"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"no usable pair; 0000000: seed \d+: \d+_1.jpg is missing"):
        bring()


def test_the_run_of_another_source_is_not_overwritten(run, tree):
    with pytest.raises(InputError, match="holds something else"):
        import_original(open_folder(str(tree)), run)
    assert verify(run) == []
