"""Captions name every attribute; instructions and exact edits say the same thing."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from ip2p.postcards import grammar
from ip2p.postcards.captions import postcard_captions
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import TASKS, apply_edits, caption_of, sample_example, sample_wording


def examples(task: str, count: int = 60):
    found = []
    index = 0
    while len(found) < count:
        rng = np.random.default_rng((1, index))
        example = sample_example(scene_of(3, index, None), rng, task)
        if example.task == task:
            found.append(example)
        index += 1
    return found


def test_two_different_scenes_never_share_a_caption():
    seen: dict[str, dict] = {}
    for i in range(3000):
        scene = scene_of(6, i, None)
        caption = caption_of(scene, sample_wording(np.random.default_rng(i)))
        assert seen.setdefault(caption, scene.attributes()) == scene.attributes()


def test_a_caption_says_nothing_of_the_layout():
    rng = np.random.default_rng(0)
    wording = sample_wording(rng)
    scene = scene_of(6, 1, None)
    moved = scene.with_(layout=scene_of(6, 2, None).layout)
    assert caption_of(scene, wording) == caption_of(moved, wording)
    assert not re.search(r"\b(left|right|small|big|near|far)\b", caption_of(scene, wording))


@pytest.mark.parametrize("task", TASKS)
def test_an_edit_keeps_the_layout_and_changes_what_it_says(task):
    for example in examples(task):
        assert example.edited_scene.layout == example.scene.layout
        before, after = example.scene.attributes(), example.edited_scene.attributes()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {edit.attribute for edit in example.edits}
        assert len(example.edits) == (2 if task == "two" else 1)
        assert example.caption != example.edited_caption


def test_adding_and_removing_are_inverse():
    for example in examples("add"):
        (edit,) = example.edits
        back = grammar.Edit("remove", "extras", edit.value).apply(example.edited_scene)
        assert back == example.scene
        assert edit.value in example.edited_scene.extras


def test_edited_caption_differs_from_the_caption_only_where_the_edit_does():
    for example in examples("colour"):
        old, new = example.scene.colour, example.edited_scene.colour
        article = lambda c: "an" if c[0] in "aeiou" else "a"  # noqa: E731
        expected = example.caption.replace(f"{article(old)} {old} ", f"{article(new)} {new} ", 1)
        assert example.edited_caption == expected


@pytest.mark.parametrize("task", [t for t in TASKS if t != "two"])
def test_phrasing_varies(task):
    first_words = collections.Counter(" ".join(e.instruction.split()[:2]) for e in examples(task, 150))
    assert len(first_words) >= 3


def test_two_edits_are_said_and_done_together():
    for example in examples("two"):
        assert apply_edits(example.scene, example.edits) == example.edited_scene
        assert re.search(r" and |, then ", example.instruction)


def test_season_edits_change_the_ground():
    values = {e.edits[0].value for e in examples("season", 80)}
    assert values == {"snow", "leaves", "grass"}
    for example in examples("season", 20):
        assert example.edits[0].attribute == "ground"


def test_postcard_captions_are_different_repeatable_and_numbered():
    first, again = postcard_captions(50, seed=1), postcard_captions(50, seed=1)
    assert first == again
    assert [row.index for row in first.rows] == list(range(50))
    assert len({row.caption for row in first.rows}) == 50
    assert len({row.prompt_id for row in first.rows}) == 50
    assert {r.caption for r in first.rows} != {r.caption for r in postcard_captions(50, seed=2).rows}
    assert postcard_captions(20, seed=1).rows == first.rows[:20]
