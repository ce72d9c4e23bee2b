"""Pictures before and after their edit, in rows under each other, to look at."""

from __future__ import annotations

import io
import typing
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ip2p.dataset.contact_sheet import fitted_text, thumbnail

THUMB = 128  # pixels
HEAD, ROW, GAP = 24, THUMB + 24, 8
COLUMNS = ("original", "edit")


def draw_rows(
    rows: Sequence[Sequence[np.ndarray]], instructions: Sequence[str], columns: Sequence[str] = COLUMNS
) -> bytes:
    """PNG of ``rows`` of pictures ``(H, W, 3)`` uint8, one a column, each row above its instruction."""
    width = len(columns) * (THUMB + GAP) + GAP
    sheet = Image.new("RGB", (width, HEAD + len(rows) * ROW), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (THUMB + GAP), 6), name, fill="#555555", font=font)
    for row, (pictures, instruction) in enumerate(zip(rows, instructions, strict=True)):
        top = HEAD + row * ROW
        for column, picture in enumerate(pictures):
            sheet.paste(thumbnail(Image.fromarray(picture), THUMB), (GAP + column * (THUMB + GAP), top))
        draw.text((GAP, top + THUMB + 4), fitted_text(instruction, font, width - 2 * GAP), fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return typing.cast(bytes, buffer.getvalue())
