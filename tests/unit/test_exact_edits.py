"""The exact judge: only the asked change, all of it, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ip2p.evaluation.exact_edits import asked_changes, attribute_accuracy, judge_edit
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import Edit
from ip2p.postcards.reader import CLASSES, AttributeReader, Reading, reader_loss, reader_targets

SCENE = scene_of(1, 1, None).with_(
    object="boat", colour="red", ground="water", sky="day", style="photo", extras=("moon",)
)


def reading_of(scene) -> Reading:
    layout = scene.layout
    return Reading(
        scene.object, scene.colour, scene.ground, scene.sky, scene.style, scene.extras, layout.horizon,
        layout.object_x, layout.object_size,
    )  # fmt: skip


EDITS = {
    "colour": Edit("colour", "colour", "blue"),
    "sky": Edit("sky", "sky", "night"),
    "add": Edit("add", "extras", "birds"),
    "remove": Edit("remove", "extras", "moon"),
    "replace": Edit("replace", "object", "house"),
}


@pytest.mark.parametrize("name", EDITS)
def test_the_exact_answer_is_exact_and_no_edit_is_not(name):
    edited = EDITS[name].apply(SCENE)
    changes = asked_changes(SCENE, edited)
    assert judge_edit(reading_of(SCENE), reading_of(edited), changes).exact
    unchanged = judge_edit(reading_of(SCENE), reading_of(SCENE), changes)
    assert not unchanged.changed_as_asked
    assert unchanged.nothing_else


@pytest.mark.parametrize(
    ("also", "part"),
    [
        ({"ground": "snow"}, "nothing_else"), ({"style": "comic"}, "nothing_else"),
        ({"extras": ()}, "nothing_else"), ({"extras": ("flag", "moon")}, "nothing_else"),
        ({"horizon": SCENE.layout.horizon + 0.07}, "same_layout"),
        ({"object_x": SCENE.layout.object_x - 0.09}, "same_layout"),
        ({"object_size": SCENE.layout.object_size + 0.11}, "same_layout"),
        ({"colour": "green"}, "changed_as_asked"),
    ],
)  # fmt: skip
def test_anything_else_that_changes_is_found(also, part):
    edited = EDITS["colour"].apply(SCENE)
    verdict = judge_edit(
        reading_of(SCENE), dataclasses.replace(reading_of(edited), **also), asked_changes(SCENE, edited)
    )
    assert not verdict.exact
    assert not getattr(verdict, part)


def test_small_differences_of_layout_are_within_the_readers_error():
    edited = EDITS["sky"].apply(SCENE)
    read = reading_of(edited)
    moved = dataclasses.replace(
        read, horizon=read.horizon + 0.05, object_x=read.object_x + 0.07, object_size=read.object_size - 0.09
    )
    assert judge_edit(reading_of(SCENE), moved, asked_changes(SCENE, edited)).exact


def test_a_replaced_object_may_have_another_size_but_not_another_place():
    edited = EDITS["replace"].apply(SCENE)
    read, changes = reading_of(edited), asked_changes(SCENE, edited)
    larger = dataclasses.replace(read, object_size=read.object_size + 0.2)
    assert judge_edit(reading_of(SCENE), larger, changes).exact
    moved = dataclasses.replace(read, object_x=read.object_x + 0.2)
    assert not judge_edit(reading_of(SCENE), moved, changes).exact


def test_asked_changes_lists_values_and_extras_that_come_and_go():
    edited = SCENE.with_(colour="blue", extras=("birds",))
    assert asked_changes(SCENE, edited) == {"colour": "blue", "birds": True, "moon": False}


def test_accuracy_counts_each_attribute_alone():
    scenes = [SCENE, SCENE.with_(colour="blue")]
    wrong = dataclasses.replace(reading_of(SCENE), colour="green", extras=())
    accuracy = attribute_accuracy([wrong, reading_of(scenes[1])], scenes)
    assert accuracy == {
        "object": 1.0, "colour": 0.5, "ground": 1.0, "sky": 1.0, "style": 1.0, "extras": pytest.approx(0.9)
    }  # fmt: skip


def test_reader_targets_and_loss_agree():
    scenes = [scene_of(1, i, None) for i in range(4)]
    targets = reader_targets(scenes)
    perfect = {
        name: 50.0 * torch.nn.functional.one_hot(targets[name], len(names)).float() for name, names in CLASSES.items()
    }
    perfect |= {"extras": 100 * targets["extras"] - 50, "layout": targets["layout"]}
    assert reader_loss(perfect, targets).item() < 1e-6
    assert reader_loss(perfect | {"layout": targets["layout"] + 0.1}, targets).item() == pytest.approx(1.0, rel=1e-3)
    outputs = AttributeReader().eval()(torch.zeros(2, 3, 64, 64))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "object": (2, 12), "colour": (2, 8), "ground": (2, 5), "sky": (2, 5), "style": (2, 5), "extras": (2, 5),
        "layout": (2, 3),
    }  # fmt: skip
