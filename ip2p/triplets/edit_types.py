"""Sets of edit types, and what makes a triplet one of a type: those of open-ended captions, and the postcards' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ip2p.errors import RecipeError
from ip2p.schema import Triplet


class EditTypes(Protocol):
    """``names`` of the types, and ``labelled``: a triplet with its type, and ``ok`` or why it cannot be used."""

    names: tuple[str, ...]

    def labelled(self, triplet: Triplet, asked: str) -> tuple[Triplet, str]: ...


def edit_types(name: str) -> EditTypes:
    """``open``, ``postcard`` or ``none``; RecipeError for another."""
    known: dict[str, Callable[[], EditTypes]] = {"open": OpenTypes, "postcard": PostcardTypes, "none": NoTypes}
    if name not in known:
        raise RecipeError(f"writing.types is {', '.join(known)}, not {name!r}")
    return known[name]()


class OpenTypes:
    """The ten types of tasks.py, by the words of the triplet; what was asked for must be among the likeliest two."""

    def __init__(self) -> None:
        from ip2p.triplets.task_reader import seed_reader
        from ip2p.triplets.tasks import TASKS

        self.names = tuple(TASKS)
        self.reader = seed_reader()

    def labelled(self, triplet: Triplet, asked: str) -> tuple[Triplet, str]:
        """Reasons: inconsistent, wrong_task. Nothing asked: the likeliest type."""
        from ip2p.triplets.consistency import inconsistencies

        triplet = replace(triplet, task=asked or self.reader.ranked(triplet)[0])
        if any(inconsistencies(triplet)):
            return triplet, "inconsistent"
        return triplet, "ok" if not asked or self.reader.agrees(triplet) else "wrong_task"


class PostcardTypes:
    """The types of the postcard grammar, read exactly off both captions."""

    def __init__(self) -> None:
        from ip2p.postcards.grammar import TASKS

        self.names: tuple[str, ...] = TASKS

    def labelled(self, triplet: Triplet, asked: str) -> tuple[Triplet, str]:
        """Reasons: inconsistent (the grammar does not know such an edit), wrong_task."""
        from ip2p.postcards.caption_reader import read_task

        task = read_task(triplet)
        if task is None:
            return triplet, "inconsistent"
        return replace(triplet, task=task), "ok" if asked in ("", task) else "wrong_task"


class NoTypes:
    """Every triplet that parses and differs is welcome."""

    names: tuple[str, ...] = ()

    def labelled(self, triplet: Triplet, asked: str) -> tuple[Triplet, str]:
        return triplet, "ok"
