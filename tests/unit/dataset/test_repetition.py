"""Edits asked a second time: the edited picture on both sides, splits and words as they were."""

from __future__ import annotations

import pytest

from ip2p.cli import main
from ip2p.dataset.repetition import repeat_run
from ip2p.dataset.run_folder import iterate_pairs, verify
from ip2p.errors import InputError
from ip2p.storage import open_folder


def test_both_pictures_are_the_edited_one(run, tmp_path):
    output = open_folder(str(tmp_path / "again"))
    report = repeat_run(run, output)
    before, after = list(iterate_pairs(run)), list(iterate_pairs(output))
    assert report.pairs == len(before) == len(after) > 0
    assert verify(output) == []
    for was, now in zip(before, after, strict=True):
        assert now["original_image"]["bytes"] == now["edited_image"]["bytes"] == was["edited_image"]["bytes"]
        assert now["caption"] == now["edited_caption"] == was["edited_caption"]
        assert (now["instruction"], now["split"]) == (was["instruction"], was["split"])
        assert (now["sim_original"], now["sim_image"], now["sim_direction"]) == (was["sim_edited"], 1.0, 0.0)
    assert not {p["pair_id"] for p in before} & {p["pair_id"] for p in after}


def test_command_says_how_many_and_leaves_other_folders_alone(run, tmp_path, capsys):
    arguments = ["repeat", "--quiet", "--input", str(run.root), "--output", str(tmp_path / "again")]
    assert main(arguments) == 0
    assert f"{len(list(iterate_pairs(run)))} pairs" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 1
    assert "holds something else" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds something else"):
        repeat_run(run, open_folder(str(tmp_path / "other")))
