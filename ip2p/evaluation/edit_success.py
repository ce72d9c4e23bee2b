"""Edits of postcards judged against the truth, which can be drawn: exact success, and damage to the background.

Held-out postcards, drawn by the renderer and edited by whatever is passed in, are read by the attribute reader
(``ip2p.evaluation.exact_edits``) and compared with the edited scene drawn at the same layout. No CLIP is involved.
"""

from __future__ import annotations

import io
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ip2p.evaluation.bootstrap import bootstrap_mean
from ip2p.evaluation.exact_edits import asked_changes, judge_edit
from ip2p.postcards.family.drawings import SIZE, scene_of
from ip2p.postcards.grammar import TASKS, EditExample, sample_example
from ip2p.postcards.reader import AttributeReader, Reading, read
from ip2p.postcards.renderer import render
from ip2p.seeds import derive_seed
from ip2p.storage import LocalFolder

EXAM = 2024
"""The set of drawings that the exam is taken from; no training set has its number."""
OTHER_EXAM = 77
"""Another such set, to look into failures and to choose by, so that ``EXAM`` is not chosen by."""
PARTS = ("changed_as_asked", "nothing_else", "same_layout")

EditExamples = Callable[[Sequence[np.ndarray], Sequence[EditExample], Sequence[int]], Sequence[np.ndarray]]
"""Pictures ``(64, 64, 3)`` uint8, what is asked of each, and a seed for each, to edited pictures of that size."""


def held_out_examples(count: int, exam: int = EXAM) -> list[EditExample]:
    """``count`` edits of scenes whose (object, colour, style) no training drawing shows, the tasks in turn.

    The first examples of a larger exam are those of a smaller one.
    """
    return examples_of(count, exam, held_out=True)


def examples_of(count: int, exam: int, held_out: bool) -> list[EditExample]:
    """The same of scenes that are ``held_out``, or of those whose combinations were seen in training."""
    found: list[EditExample] = []
    index = 0
    while len(found) < count:
        task = TASKS[len(found) % len(TASKS)]
        rng = np.random.default_rng(derive_seed("exam", exam, index))
        example = sample_example(scene_of(exam, index, held_out), rng, task)
        index += 1
        # A picture without extras has none to remove.
        if example.task == task:
            found.append(example)
    return found


def no_edit(pictures: Sequence[np.ndarray], examples: Sequence[EditExample], seeds: Sequence[int]) -> list[np.ndarray]:
    """The baseline that damages nothing and changes nothing."""
    return list(pictures)


def drawn_truth(
    pictures: Sequence[np.ndarray], examples: Sequence[EditExample], seeds: Sequence[int]
) -> list[np.ndarray]:
    """The right answers: what they score is the most that the reader lets anyone score."""
    return [render(example.edited_scene, SIZE) for example in examples]


def by_instruction(edit: Callable[..., Sequence[np.ndarray]]) -> EditExamples:
    """``Editor.edit``, its other settings bound, as what takes the exam."""
    return lambda pictures, examples, seeds: edit(pictures, [one.instruction for one in examples], seed=seeds)


def by_edited_caption(edit: Callable[..., Sequence[np.ndarray]]) -> EditExamples:
    """``sdedit``, its other settings bound: it is told what the result should show, not what to change."""
    return lambda pictures, examples, seeds: edit(pictures, [one.edited_caption for one in examples], seed=seeds)


def measure_edits(
    edit: EditExamples,
    examples: Sequence[EditExample],
    reader: AttributeReader,
    seed: int = 0,
    examples_per_call: int = 32,
    progress: Callable[[int], object] | None = None,
    first: int = 0,
) -> list[dict[str, typing.Any]]:
    """One record an example: its words and task, the verdict and its parts, and how far the pixels are off.

    ``first`` is the place of ``examples`` in the exam that they are a part of; an example's noise depends on its place.
    """
    records = []
    for start in range(0, len(examples), examples_per_call):
        part = examples[start : start + examples_per_call]
        pictures = [render(example.scene, SIZE) for example in part]
        seeds = [derive_seed("exam", seed, first + start + place) for place in range(len(part))]
        edited = edit(pictures, part, seeds)
        before, after = read_pictures(reader, pictures), read_pictures(reader, edited)
        for place, example in enumerate(part):
            truth = render(example.edited_scene, SIZE)
            errors = pixel_errors(pictures[place], truth, edited[place])
            verdict = _verdict(example, before[place], after[place])
            records.append({"example": first + start + place, "seed": seeds[place], **verdict, **errors})
        if progress is not None:
            progress(len(part))
    return records


def read_pictures(reader: AttributeReader, pictures: Sequence[np.ndarray]) -> list[Reading]:
    """What the reader sees in uint8 pictures ``(64, 64, 3)``."""
    unit = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return read(reader, unit)


def pixel_errors(original: np.ndarray, truth: np.ndarray, edited: np.ndarray) -> dict[str, float | None]:
    """Mean absolute errors over channels, in [0, 1]; all pictures ``(H, W, 3)`` uint8.

    ``background_error`` is over the pixels in which the drawn original and the drawn truth agree, ``background_share``
    of all; None where there are none. ``truth_error`` is over all pixels.
    """
    background = (original == truth).all(axis=2)
    off = np.abs(edited.astype(np.float64) - truth).mean(axis=2) / 255
    return {
        "background_error": float(off[background].mean()) if background.any() else None,
        "background_share": float(background.mean()),
        "truth_error": float(off.mean()),
    }


def summarise(records: Sequence[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    """Success with its 95 % band, overall and by task, its parts, and mean errors of the pixels.

    ``background_error`` is a mean over background pixels, not over pictures: a picture whose edit leaves three pixels
    alone says little of damage. Within a task ``by_value`` says how many edits asked for each value, and which share of
    them succeeded: a task can look middling because one of its values is never learned. Two edits at once count twice.
    """
    return {
        **_summary(records),
        "by_task": {
            task: {**_summary(mine), "by_value": _by_value(mine)}
            for task in TASKS
            if (mine := [record for record in records if record["task"] == task])
        },
    }


def draw_success(results: dict[str, dict[str, typing.Any]], path: Path) -> None:
    """Bars of success by task, one colour a method, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    tasks = ["overall", *TASKS]
    width = 0.8 / max(1, len(results))
    for number, (method, result) in enumerate(results.items()):
        shares = [(result if task == "overall" else result["by_task"].get(task, {})).get("success") for task in tasks]
        heights = [share["mean"] if share else 0.0 for share in shares]
        places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(tasks))]
        axes.bar(places, heights, width, label=method)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of exact edits")
    figure.legend(loc="outside upper right", ncols=len(results))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    LocalFolder(path.parent).write(path.name, buffer.getvalue())


def _verdict(example: EditExample, before: Reading, after: Reading) -> dict[str, typing.Any]:
    verdict = judge_edit(before, after, asked_changes(example.scene, example.edited_scene))
    return {
        "task": example.task,
        "values": [edit.value for edit in example.edits],
        "instruction": example.instruction,
        "edited_caption": example.edited_caption,
        "exact": verdict.exact,
        **{part: getattr(verdict, part) for part in PARTS},
    }


def _by_value(records: Sequence[dict[str, typing.Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, list[bool]] = {}
    for record in records:
        for value in record["values"]:
            found.setdefault(value, []).append(record["exact"])
    return {value: {"count": len(exact), "success": sum(exact) / len(exact)} for value, exact in sorted(found.items())}


def _summary(records: Sequence[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    backgrounds = [(r["background_error"], r["background_share"]) for r in records if r["background_error"] is not None]
    pixels = math.fsum(share for _, share in backgrounds)
    return {
        "count": len(records),
        "success": bootstrap_mean([float(record["exact"]) for record in records])._asdict(),
        **{part: bootstrap_mean([float(record[part]) for record in records], 1).mean for part in PARTS},
        "background_error": math.fsum(error * share for error, share in backgrounds) / pixels if pixels else None,
        "truth_error": bootstrap_mean([record["truth_error"] for record in records], 1).mean,
    }
