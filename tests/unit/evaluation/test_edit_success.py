"""The exam on postcards, sat by functions whose marks are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ip2p.evaluation import edit_success
from ip2p.evaluation.edit_success import (
    by_edited_caption,
    by_instruction,
    draw_success,
    drawn_truth,
    examples_of,
    held_out_examples,
    measure_edits,
    no_edit,
    pixel_errors,
    read_pictures,
    summarise,
)
from ip2p.postcards.family.drawings import SIZE
from ip2p.postcards.grammar import TASKS
from ip2p.postcards.reader import AttributeReader, Reading
from ip2p.postcards.renderer import render
from ip2p.postcards.scene import is_held_out

COUNT = 2 * len(TASKS)


@pytest.fixture(scope="module")
def examples():
    return held_out_examples(COUNT)


@pytest.fixture
def perfect_reader(monkeypatch: pytest.MonkeyPatch, examples) -> AttributeReader:
    """Knows every drawing of the exam by its pixels; of any other picture it says that it shows nothing known."""
    known = {}
    for example in examples:
        for scene in (example.scene, example.edited_scene):
            known[render(scene, SIZE).tobytes()] = scene

    def read_drawings(reader, pictures):
        return [reading_of(known.get(np.asarray(picture).tobytes())) for picture in pictures]

    monkeypatch.setattr(edit_success, "read_pictures", read_drawings)
    return AttributeReader()


def reading_of(scene) -> Reading:
    if scene is None:
        return Reading("?", "?", "?", "?", "?", (), -1.0, -1.0, -1.0)
    layout = scene.layout
    return Reading(
        scene.object, scene.colour, scene.ground, scene.sky, scene.style, scene.extras, layout.horizon,
        layout.object_x, layout.object_size,
    )  # fmt: skip


def test_exam_is_fixed_takes_the_tasks_in_turn_and_shows_only_held_out_combinations(examples):
    assert [example.task for example in examples] == list(TASKS) * 2
    for example in examples:
        assert is_held_out(example.scene.object, example.scene.colour, example.scene.style)
        assert example.edited_scene.layout == example.scene.layout
    assert held_out_examples(5) == examples[:5]
    assert held_out_examples(3, exam=1) != examples[:3]
    assert len({example.scene for example in examples}) == COUNT


@pytest.mark.parametrize("held_out", [True, False])
def test_examples_are_of_combinations_held_out_or_seen_as_asked(held_out: bool) -> None:
    found = examples_of(2 * len(TASKS), 5, held_out)
    assert {example.task for example in found} == set(TASKS)
    scenes = [example.scene for example in found]
    assert {is_held_out(scene.object, scene.colour, scene.style) for scene in scenes} == {held_out}


def test_truth_is_exact_and_undamaged_and_no_edit_is_not_exact(examples, perfect_reader):
    truth = summarise(measure_edits(drawn_truth, examples, perfect_reader, examples_per_call=5))
    assert truth["success"]["mean"] == 1.0
    assert (truth["background_error"], truth["truth_error"]) == (0.0, 0.0)
    nothing = summarise(measure_edits(no_edit, examples, perfect_reader))
    assert nothing["success"]["mean"] == nothing["changed_as_asked"] == 0.0
    assert nothing["nothing_else"] == nothing["same_layout"] == 1.0
    assert nothing["background_error"] == 0.0
    assert nothing["truth_error"] > 0.01


def test_each_record_belongs_to_its_example_whatever_the_call(examples, perfect_reader):
    seen = []

    def edit(pictures, part, seeds):
        seen.append(len(part))
        return [render((one.edited_scene if one.task in ("sky", "add") else one.scene), SIZE) for one in part]

    records = measure_edits(edit, examples, perfect_reader, examples_per_call=7, progress=seen.append)
    assert seen == [7, 7, 7, 7, 4, 4]
    assert [record["exact"] for record in records] == [example.task in ("sky", "add") for example in examples]
    assert [record["values"] for record in records] == [[edit.value for edit in one.edits] for one in examples]
    assert [record["instruction"] for record in records] == [example.instruction for example in examples]
    assert len({record["seed"] for record in records}) == COUNT
    assert records == measure_edits(edit, examples, perfect_reader)
    assert {r["seed"] for r in measure_edits(edit, examples[:2], perfect_reader, seed=1)} != {
        r["seed"] for r in records[:2]
    }


def test_instruction_models_are_told_the_instruction_and_sdedit_the_caption(examples):
    told = []

    def edit(pictures, texts, *, seed):
        told.append((list(texts), list(seed)))
        return list(pictures)

    pictures = [np.zeros((SIZE, SIZE, 3), np.uint8)] * 2
    by_instruction(edit)(pictures, examples[:2], [3, 4])
    by_edited_caption(edit)(pictures, examples[:2], [3, 4])
    assert told == [
        ([one.instruction for one in examples[:2]], [3, 4]), ([one.edited_caption for one in examples[:2]], [3, 4])
    ]  # fmt: skip


def test_background_is_where_both_drawings_agree():
    original, truth = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    truth[0, 0, 1] = 255  # one channel of one pixel is asked to change
    edited = np.full((2, 2, 3), 51, np.uint8)
    errors = pixel_errors(original, truth, edited)
    assert errors["background_share"] == 0.75
    assert errors["background_error"] == pytest.approx(0.2)
    assert errors["truth_error"] == pytest.approx((3 * 0.2 + (0.2 + 0.8 + 0.2) / 3) / 4)
    edited[0, 0] = 255  # what happens there is no damage
    assert pixel_errors(original, truth, edited)["background_error"] == pytest.approx(0.2)


def test_picture_that_is_asked_to_change_everywhere_has_no_background():
    errors = pixel_errors(*(np.full((2, 2, 3), value, np.uint8) for value in (0, 9, 5)))
    assert errors["background_error"] is None
    assert errors["background_share"] == 0.0


def record(task: str, exact: bool, error: float | None = 0.0, share: float = 1.0, values: tuple[str, ...] = ()) -> dict:
    parts = dict.fromkeys(("changed_as_asked", "nothing_else", "same_layout"), exact)
    return {"task": task, "values": list(values), "exact": exact, **parts, "background_error": error,
            "background_share": share, "truth_error": 0.5}  # fmt: skip


def test_summary_counts_by_task_and_weighs_damage_by_pixels():
    records = [record("sky", True, 0.1, 0.2), record("sky", False, 0.4, 0.1), record("add", True, None, 0.0)]
    found = summarise(records)
    assert found["count"] == 3
    assert found["success"]["mean"] == pytest.approx(2 / 3)
    assert {task: part["success"]["mean"] for task, part in found["by_task"].items()} == {"sky": 0.5, "add": 1.0}
    assert found["background_error"] == pytest.approx((0.1 * 0.2 + 0.4 * 0.1) / 0.3)
    assert found["by_task"]["add"]["background_error"] is None
    assert found["truth_error"] == 0.5


def test_summary_tells_the_values_of_a_task_apart():
    records = [
        record("add", True, values=("moon",)), record("add", False, values=("snowfall",)),
        record("add", True, values=("moon",)), record("two", False, values=("moon", "night")),
    ]  # fmt: skip
    found = summarise(records)["by_task"]
    assert found["add"]["by_value"] == {"moon": {"count": 2, "success": 1.0}, "snowfall": {"count": 1, "success": 0.0}}
    assert found["two"]["by_value"] == {"moon": {"count": 1, "success": 0.0}, "night": {"count": 1, "success": 0.0}}


def test_a_figure_is_written(tmp_path: Path):
    results = {
        "ours": summarise([record("sky", True), record("add", False)]), "no edit": summarise([record("sky", False)])
    }  # fmt: skip
    draw_success(results, tmp_path / "success.png")
    assert (tmp_path / "success.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.weights
def test_the_shipped_reader_marks_drawn_truths_as_exact_and_no_edit_as_none():
    from ip2p.models.components import embedded_folder
    from ip2p.postcards.reader import load_reader

    reader = load_reader(embedded_folder("reader"))
    examples = held_out_examples(12 * len(TASKS))
    assert summarise(measure_edits(drawn_truth, examples, reader))["success"]["mean"] >= 0.93
    assert summarise(measure_edits(no_edit, examples, reader))["success"]["mean"] == 0.0
    assert [example.task for example in examples] == list(TASKS) * 12
    readings = read_pictures(reader, [render(example.scene, SIZE) for example in examples])
    wrong = [r for r, example in zip(readings, examples, strict=True) if r.differing(example.scene)]
    assert len(wrong) <= 4


def test_judging_is_against_the_drawn_original_so_a_moved_object_is_no_success(examples, monkeypatch):
    example = next(example for example in examples if example.task == "sky")
    moved = dataclasses.replace(reading_of(example.edited_scene), object_x=example.scene.layout.object_x + 0.2)
    readings = iter([[reading_of(example.scene)], [moved]])
    monkeypatch.setattr(edit_success, "read_pictures", lambda reader, pictures: next(readings))
    found = measure_edits(no_edit, [example], AttributeReader())[0]
    assert found["changed_as_asked"]
    assert not found["same_layout"]
    assert not found["exact"]
