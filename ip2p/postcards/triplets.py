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

# Times asked for: the share among kept pairs that each task should have, divided by how often its candidates pass, and
# more of what a model learns last: replacing the object, two edits at once, skies and styles.
QUOTAS = {
    "add": 8, "remove": 4, "replace": 24, "colour": 4, "ground": 10, "sky": 17, "season": 3, "style": 14, "two": 20,
}  # fmt: skip

# The same within a task, beside its other values; a task that is not here asks for all alike. Snowfall above all: of
# what the fifth edition was asked to add it came out least, and pairs of it were half a percent of all.
VALUE_QUOTAS = {
    "add": {"snowfall": 10.0, "flag": 1.5, "birds": 1.2, "rainbow": 1.0, "moon": 0.6},
    "remove": {"snowfall": 7.0, "rainbow": 2.0, "birds": 0.6, "flag": 0.6, "moon": 0.6},
    "ground": {"grass": 4.0, "snow": 3.0, "sand": 2.0, "water": 2.0, "leaves": 1.0},
    "sky": {"sunset": 4.0, "dawn": 3.5, "overcast": 3.5, "night": 3.0, "day": 2.0},
    "season": {"leaves": 2.0, "snow": 1.0, "grass": 0.6},
    "style": {"watercolour": 7.0, "photo": 3.0, "comic": 3.0, "pencil": 2.5, "pixel": 1.0},
}
OTHER_OF_TWO = 0.3  # of two edits at once without a value that has a quota, so that those with one get more


def postcard_triplets(count: int, seed: int = 0) -> Iterator[tuple[EditExample, str]]:
    """``count`` edits, and for each the instruction that takes it back; no scene of them is held out."""
    tasks, weights = list(QUOTAS), np.array(list(QUOTAS.values()), float)
    order = np.random.default_rng((TRIPLET_SET, seed))
    place = 0
    for _ in range(count):
        task = str(order.choice(tasks, p=weights / weights.sum()))
        found = None
        while found is None:
            found = _asked(seed, place, task)
            place += 1
        yield found


def _asked(seed: int, place: int, task: str) -> tuple[EditExample, str] | None:
    """An edit of scene ``place``; None where it is none to train on, or its value has been asked for often enough."""
    rng = np.random.default_rng((TRIPLET_SET, seed, place))
    example, back = _both_ways(scene_of(TRIPLET_SET + seed, place, False), rng, task)
    if example.task != task or _held_out(example.edited_scene):
        return None
    return (example, back) if rng.random() < _share(example) else None


def _share(example: EditExample) -> float:
    """Of edits to this value (of two at once: to the value that is wanted more), the share that is asked for."""
    asked = [(VALUE_QUOTAS[edit.task], edit.value) for edit in example.edits if edit.task in VALUE_QUOTAS]
    shares = [quotas[value] / max(quotas.values()) for quotas, value in asked]
    if len(asked) < len(example.edits):
        shares.append(OTHER_OF_TWO if example.task == "two" else 1.0)
    return max(shares)


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
