"""Ready triplets from the grammar, with shares by task, and the same edits turned around.

A local edit passes the filter less often than a change of the whole picture, so a set whose kept pairs are balanced
asks for it more often. A pair turned around is a pair too: what was added is removed. Nothing is painted here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import (
    SEASONS,
    Edit,
    EditExample,
    caption_of,
    instruction_of,
    sample_edits,
    sample_wording,
)
from ip2p.postcards.scene import Scene, is_held_out

TRIPLET_SET = 57  # apart from every set of drawings that the family was trained on

# Times asked for: the share among kept pairs that each task should have, divided by how often its candidates pass.
# Replacing the object and two edits at once are what a model learns last, so they get the most.
QUOTAS = {
    "add": 5, "remove": 4, "replace": 22, "colour": 5, "ground": 4, "sky": 5, "season": 2, "style": 4, "two": 20,
}  # fmt: skip


def postcard_triplets(count: int, seed: int = 0) -> Iterator[tuple[EditExample, str]]:
    """``count`` edits, and for each the instruction that takes it back; no scene of them is held out."""
    tasks, weights = list(QUOTAS), np.array(list(QUOTAS.values()), float)
    place = made = 0
    while made < count:
        rng = np.random.default_rng((TRIPLET_SET, seed, place))
        scene = scene_of(TRIPLET_SET + seed, place, False)
        task = str(rng.choice(tasks, p=weights / weights.sum()))
        place += 1
        example, back = _both_ways(scene, rng, task)
        if example.task == task and not _held_out(example.edited_scene):
            made += 1
            yield example, back


def _both_ways(scene: Scene, rng: np.random.Generator, task: str) -> tuple[EditExample, str]:
    wording = sample_wording(rng)
    edits = sample_edits(scene, rng, task)
    there = _steps(scene, edits)
    edited = there[-1]
    words = instruction_of(scene, edits, wording, rng)
    back = tuple(edit_back(edit, before) for edit, before in zip(reversed(edits), reversed(there[:-1]), strict=True))
    example = EditExample(scene, edits, edited, caption_of(scene, wording), words, caption_of(edited, wording))
    return example, instruction_of(edited, back, wording, rng)


def _steps(scene: Scene, edits: tuple[Edit, ...]) -> list[Scene]:
    """``scene`` and what each of ``edits`` makes of the one before."""
    scenes = [scene]
    for edit in edits:
        scenes.append(edit.apply(scenes[-1]))
    return scenes


def edit_back(edit: Edit, before: Scene) -> Edit:
    """The edit that undoes ``edit`` of ``before``."""
    if edit.task in ("add", "remove"):
        return Edit("remove" if edit.task == "add" else "add", "extras", edit.value)
    value = str(getattr(before, edit.attribute))
    # Sand and water are no seasons.
    task = "ground" if edit.task == "season" and value not in SEASONS else edit.task
    return Edit(task, edit.attribute, value)


def _held_out(scene: Scene) -> bool:
    return is_held_out(scene.object, scene.colour, scene.style)
