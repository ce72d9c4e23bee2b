"""Ready triplets: balanced by quota, never of held-out scenes, and each with the words of its way back."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from ip2p.cli import main
from ip2p.images import decode_image
from ip2p.postcards.grammar import TASKS, Edit, apply_edits
from ip2p.postcards.renderer import render
from ip2p.postcards.scene import SKIES, is_held_out
from ip2p.postcards.triplets import QUOTAS, VALUE_QUOTAS, edit_back, postcard_triplets


@pytest.fixture(scope="module")
def made():
    return list(postcard_triplets(600, seed=3))


def test_way_back_leads_back(made):
    for example, _ in made:
        scene = example.scene
        for edit in example.edits:
            after = edit.apply(scene)
            assert edit_back(edit, scene).apply(after) == scene.with_(extras=tuple(sorted(scene.extras)))
            scene = after
        assert apply_edits(example.scene, example.edits) == example.edited_scene


def test_words_of_the_way_back_name_what_was_there(made):
    backs = {example.task: (example, back) for example, back in made}
    example, back = backs["add"]
    assert any(word in back for word in ("remove", "away", "rid", "erase", "without", "delete"))
    example, back = backs["colour"]
    assert example.scene.colour in back
    assert example.edited_scene.colour not in back.split()


def test_a_season_from_sand_goes_back_as_a_change_of_ground(made):
    scene = next(example.scene for example, _ in made if example.scene.ground == "sand")
    assert edit_back(Edit("season", "ground", "snow"), scene) == Edit("ground", "ground", "sand")
    snowy = scene.with_(ground="snow")
    assert edit_back(Edit("season", "ground", "leaves"), snowy) == Edit("season", "ground", "snow")


def test_tasks_come_in_their_quotas_and_nothing_is_held_out(made):
    counts = collections.Counter(example.task for example, _ in made)
    assert set(QUOTAS) == set(TASKS)
    assert counts["replace"] > 2 * counts["colour"] > 0
    for example, _ in made:
        for scene in (example.scene, example.edited_scene):
            assert not is_held_out(scene.object, scene.colour, scene.style)
    assert {example.edited_scene.sky for example, _ in made} == set(SKIES)


def test_values_come_in_their_quotas():
    counts = collections.Counter(
        (edit.task, edit.value)
        for example, _ in postcard_triplets(1500, seed=3)
        if example.task != "two"
        for edit in example.edits
    )
    for task, quotas in VALUE_QUOTAS.items():
        total = sum(counts[task, value] for value in quotas)
        most = max(quotas, key=quotas.__getitem__)
        share = quotas[most] / sum(quotas.values())
        # Skies, grounds and styles never change to what is there already, which is the same for all values.
        assert counts[task, most] / total == pytest.approx(share, abs=0.12), task
        assert min(counts[task, value] for value in quotas) > 0
    assert counts["add", "snowfall"] > 3 * counts["add", "flag"]


def test_a_larger_set_begins_with_the_smaller_one(made):
    assert list(postcard_triplets(20, seed=3)) == made[:20]
    assert list(postcard_triplets(20, seed=4)) != made[:20]


def test_command_writes_both_ways(tmp_path):
    assert main(["postcard", "--triplets", "12", "--output", str(tmp_path / "t.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for there, back in zip(rows[:12], rows[12:], strict=True):
        assert (there["caption"], there["edited_caption"]) == (back["edited_caption"], back["caption"])
        assert there["instruction"]
        assert back["instruction"]


def test_command_draws_what_is_captioned_beside_the_triplets(tmp_path):
    drawn = ["--triplets", "5", "--seed", "3", "--pictures", "--size", "32"]
    assert main(["postcard", *drawn, "--output", str(tmp_path / "t.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["url"] for row in rows[:5]] == [f"t-pictures/{number:06d}.png" for number in range(5)]
    assert not any("url" in row for row in rows[5:])
    for row, (example, _) in zip(rows[:5], postcard_triplets(5, seed=3), strict=True):
        assert row["caption"] == example.caption
        assert np.array_equal(decode_image((tmp_path / row["url"]).read_bytes()), render(example.scene, 32))


def test_pictures_without_triplets_are_refused(tmp_path, capsys):
    assert main(["postcard", "--pictures", "--output", str(tmp_path / "x.png")]) == 1
    assert "--pictures goes with --triplets" in capsys.readouterr().err
