"""Did exactly the asked change happen? Read off two pictures, with no CLIP and no threshold of CLIP involved.

Only postcards can be judged so: their attributes are few and their reader is nearly perfect on drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ip2p.postcards.reader import CLASSES, LAYOUT, Reading
from ip2p.postcards.scene import Scene


@dataclass(frozen=True)
class EditVerdict:
    """What two readings say of one edit."""

    changed_as_asked: bool  # the edited picture shows every asked value
    nothing_else: bool  # no other attribute is read differently
    same_layout: bool  # horizon, place and size stayed within the reader's tolerance

    @property
    def exact(self) -> bool:
        return self.changed_as_asked and self.nothing_else and self.same_layout


def asked_changes(scene: Scene, edited_scene: Scene) -> dict[str, object]:
    """Attribute (or extra) to the value that the edit asks for; an extra's value is whether it should be there."""
    changes: dict[str, object] = {
        name: getattr(edited_scene, name) for name in CLASSES if getattr(scene, name) != getattr(edited_scene, name)
    }
    for extra in set(scene.extras) ^ set(edited_scene.extras):
        changes[extra] = extra in edited_scene.extras
    return changes


def judge_edit(original: Reading, edited: Reading, changes: dict[str, object]) -> EditVerdict:
    """Compare the two readings of a pair with what was asked (``asked_changes``)."""

    def shows(name: str, value: object) -> bool:
        return (name in edited.extras) == value if name not in CLASSES else getattr(edited, name) == value

    differing = original.differing(edited)
    # A change of object changes what its size means, so a replaced object may be of another size.
    held = ("horizon", "object_x") if "object" in changes else LAYOUT
    return EditVerdict(
        changed_as_asked=all(shows(name, value) for name, value in changes.items()) and set(changes) <= differing,
        nothing_else=differing <= set(changes),
        same_layout=original.same_layout(edited, held),
    )


def attribute_accuracy(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures whose reading agrees with the scene, by attribute; ``extras`` counts each extra alone."""
    shares = {
        name: sum(getattr(r, name) == getattr(s, name) for r, s in zip(readings, scenes, strict=True)) / len(scenes)
        for name in CLASSES
    }
    wrong = sum(len(set(r.extras) ^ set(s.extras)) for r, s in zip(readings, scenes, strict=True))
    return shares | {"extras": 1 - wrong / (5 * len(scenes))}
