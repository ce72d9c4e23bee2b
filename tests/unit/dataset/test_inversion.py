"""Runs turned around: pictures, captions and scores change places, words come from the file, splits stay."""

from __future__ import annotations

import json

import pytest

from ip2p.cli import main
from ip2p.dataset.inversion import invert_run
from ip2p.dataset.run_folder import iterate_pairs, verify
from ip2p.errors import DatasetError
from ip2p.storage import open_folder
from ip2p.triplets.captions import CaptionRow
from tests.ledgers import iterate_ledger


@pytest.fixture
def back(run):
    """A way back for every prompt of the run."""
    pairs = {(p["edited_caption"], p["caption"]) for p in iterate_pairs(run)}
    return [
        CaptionRow(i, f"back{i}", i + 1, caption, instruction=f"undo {i}", edited_caption=edited)
        for i, (caption, edited) in enumerate(sorted(pairs))
    ]


def test_pairs_are_turned_around(run, back, tmp_path):
    output = open_folder(str(tmp_path / "back"))
    report = invert_run(run, back, output)
    before, after = list(iterate_pairs(run)), list(iterate_pairs(output))
    assert report.pairs == len(before) == len(after) > 0
    assert verify(output) == []
    for was, now in zip(before, after, strict=True):
        assert now["original_image"]["bytes"] == was["edited_image"]["bytes"]
        assert now["edited_image"]["bytes"] == was["original_image"]["bytes"]
        assert (now["caption"], now["edited_caption"]) == (was["edited_caption"], was["caption"])
        assert (now["sim_original"], now["sim_edited"]) == (was["sim_edited"], was["sim_original"])
        assert (now["sim_image"], now["sim_direction"]) == (was["sim_image"], was["sim_direction"])
        assert now["instruction"].startswith("undo ")
        assert now["split"] == was["split"]  # by the first caption, not by the one that now comes first
    assert not {p["pair_id"] for p in before} & {p["pair_id"] for p in after}


def test_a_prompt_without_a_way_back_is_left_out_and_named(run, back, tmp_path):
    lost = back.pop()
    output = open_folder(str(tmp_path / "back"))
    report = invert_run(run, back, output)
    assert len(report.problems) == 1
    assert f"no triplet leads from {lost.caption!r} back to {lost.edited_caption!r}" in report.problems[0]
    assert lost.caption not in {pair["caption"] for pair in iterate_pairs(output)}
    errors = [row["error"] for row in iterate_ledger(output) if row["status"] == "error"]
    assert len(errors) == 1


def test_no_way_back_at_all_is_an_error(run, tmp_path):
    with pytest.raises(DatasetError, match=r"no usable pair; .*no triplet leads from"):
        invert_run(run, [], open_folder(str(tmp_path / "back")))


def test_turning_around_a_run_that_cannot_be_read_any_more_leaves_what_was_made_of_it(run, back, tmp_path):
    output = open_folder(str(tmp_path / "back"))
    invert_run(run, back, output)
    run.delete("manifest.json")
    with pytest.raises(DatasetError, match="has not finished"):
        invert_run(run, back, output)
    assert verify(output) == []


def test_command(run, back, tmp_path, capsys):
    rows = [{"caption": r.caption, "instruction": r.instruction, "edited_caption": r.edited_caption} for r in back]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--input", run.uri, "--triplets", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "back")]
    assert main(["invert", *arguments, "--quiet"]) == 0
    assert f"{len(back)} prompts" in capsys.readouterr().out
