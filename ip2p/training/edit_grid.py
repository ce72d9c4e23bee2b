"""A fixed grid of edits to look at while training: the same held-out pairs, the same noise, one picture a look.

Each row shows the original, the edit by the weights of now, and the pair's edited image, under its instruction.
"""

from __future__ import annotations

from collections.abc import Sequence

from ip2p.editing.before_after import draw_rows
from ip2p.editing.editor import Editor
from ip2p.models.components import EditModel
from ip2p.training.encoding import square_pair
from ip2p.training.pair_index import Record, ShardRows, read_shard_rows

PAIRS = 8
STEPS = 20
COLUMNS = ("original", "edit", "pair's edited image")


def grid_pairs(shards: Sequence[ShardRows], count: int = PAIRS) -> list[Record]:
    """The first pairs of ``shards``, one a prompt as far as there are enough prompts, at most ``count``."""
    found: list[Record] = []
    prompts: set[str] = set()
    for shard in shards:
        for record in read_shard_rows(shard):
            # Candidates of a prompt look alike; its caption tells prompts apart.
            if record["caption"] not in prompts:
                prompts.add(record["caption"])
                found.append(record)
            if len(found) == count:
                return found
    return found


def draw_grid(model: EditModel, pairs: Sequence[Record], resolution: int) -> bytes:
    """PNG of ``pairs`` as edited by ``model`` at ``resolution`` pixels, at the model's own scales and seed 0."""
    squares = [
        square_pair(pair["original_image"]["bytes"], pair["edited_image"]["bytes"], pair["pair_id"], resolution)
        for pair in pairs
    ]
    originals = [original for original, _ in squares]
    edits = Editor(model).edit(
        originals, [pair["instruction"] for pair in pairs], steps=STEPS, resolution=resolution
    )  # fmt: skip
    rows = [(original, edit, truth) for (original, truth), edit in zip(squares, edits, strict=True)]
    return draw_rows(rows, [pair["instruction"] for pair in pairs], COLUMNS)
