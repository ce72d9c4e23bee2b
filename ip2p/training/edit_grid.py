"""A fixed grid of edits to look at while training: the same held-out pairs, the same noise, one picture a look.

Each row shows the original, the edit by the weights of now, and the pair's edited image, under its instruction.
"""

from __future__ import annotations

import io
import typing
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ip2p.dataset.contact_sheet import fitted_text, thumbnail
from ip2p.editing.editor import Editor
from ip2p.models.components import EditModel
from ip2p.training.encoding import square_pair
from ip2p.training.pair_index import Record, ShardRows, read_shard_rows

PAIRS = 8
STEPS = 20
THUMB = 128  # pixels
COLUMNS = ("original", "edit", "pair's edited image")
ROW = THUMB + 24
GAP = 8


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
    """PNG of ``pairs`` as edited by ``model`` at ``resolution`` pixels, at the original's scales and seed 0."""
    squares = [
        square_pair(pair["original_image"]["bytes"], pair["edited_image"]["bytes"], pair["pair_id"], resolution)
        for pair in pairs
    ]
    originals = [original for original, _ in squares]
    edits = Editor(model).edit(
        originals, [pair["instruction"] for pair in pairs], steps=STEPS, resolution=resolution
    )  # fmt: skip
    rows = [(original, edit, truth) for (original, truth), edit in zip(squares, edits, strict=True)]
    return _drawn(rows, [pair["instruction"] for pair in pairs])


def _drawn(rows: Sequence[tuple[np.ndarray, ...]], instructions: Sequence[str]) -> bytes:
    width = len(COLUMNS) * (THUMB + GAP) + GAP
    sheet = Image.new("RGB", (width, 24 + len(rows) * ROW), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, name in enumerate(COLUMNS):
        draw.text((GAP + column * (THUMB + GAP), 6), name, fill="#555555", font=font)
    for row, (pictures, instruction) in enumerate(zip(rows, instructions, strict=True)):
        top = 24 + row * ROW
        for column, picture in enumerate(pictures):
            sheet.paste(thumbnail(Image.fromarray(picture), THUMB), (GAP + column * (THUMB + GAP), top))
        draw.text((GAP, top + THUMB + 4), fitted_text(instruction, font, width - 2 * GAP), fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return typing.cast(bytes, buffer.getvalue())
