"""Which edits take part in the next UNet call: a decision about numbers alone.

Interactive edits go first, and within a lane the one with the least work left, made less by waiting, so that a short
edit does not stand behind a long one and a long one is not overtaken for ever: counted from when it came, not from its
last step, or a full server would let a long edit take one step every few seconds. Batch edits fill what room is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AGEING_ROWS_PER_S = 30.0
"""By how many rows a second of waiting makes an edit's remaining work look smaller."""


@dataclass(frozen=True)
class Waiting:
    """An edit that could take a step now."""

    number: int  # any, of its own; the smaller came first
    rows: int  # UNet rows of its next step
    left: int  # UNet rows of all its steps that are left
    waited_s: float  # since it came
    batch: bool = False  # in the batch lane
    alone: bool = False  # its rows never share a call with another's


def chosen(waiting: Sequence[Waiting], cap: int) -> list[int]:
    """Numbers of the edits whose rows fit into a call of ``cap`` rows; the first one goes whether it fits or not."""
    ordered = sorted(waiting, key=lambda edit: (edit.batch, edit.left - AGEING_ROWS_PER_S * edit.waited_s, edit.number))
    if not ordered or ordered[0].alone:
        return [ordered[0].number] if ordered else []
    numbers: list[int] = []
    room = cap
    for edit in ordered:
        if not edit.alone and (edit.rows <= room or not numbers):
            numbers.append(edit.number)
            room -= edit.rows
    return numbers
