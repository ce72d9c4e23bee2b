"""A picture of a run to look at: kept pairs side by side with instruction and scores."""

from __future__ import annotations

import io
import itertools
import typing

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ip2p.dataset.manifest import FileEntry, table_files
from ip2p.dataset.tables import read_parquet_bytes
from ip2p.storage import Folder

THUMB = 128  # pixels, each picture
CELL = (2 * THUMB + 24, THUMB + 58)
COLUMNS = 4
COLUMN_NAMES = [
    "original_image", "edited_image", "caption", "instruction", "edited_caption", "p2p_threshold", "guidance_scale",
    "sim_original", "sim_edited", "sim_image", "sim_direction", "rank",
]  # fmt: skip


def contact_sheet(folder: Folder, files: dict[str, FileEntry], at_most: int = 48) -> bytes:
    """PNG of the best pair of each of the first ``at_most`` prompts that have one; ``files`` as in the manifest."""
    filled = (name for name in table_files(files, "pairs") if files[name]["rows"])
    tables = (read_parquet_bytes(folder.read(name), name, COLUMN_NAMES).to_pylist() for name in filled)
    best = (pair for table in tables for pair in table if pair["rank"] == 0)
    return draw_sheet(list(itertools.islice(best, at_most)))


def draw_sheet(pairs: list[dict[str, typing.Any]]) -> bytes:
    """``pairs`` as rows of four cells; an empty list gives a sheet that says so."""
    rows = max(1, -(-len(pairs) // COLUMNS))
    columns = min(COLUMNS, max(1, len(pairs)))
    sheet = Image.new("RGB", (columns * CELL[0], rows * CELL[1]), "white")
    draw = ImageDraw.Draw(sheet)
    if not pairs:
        draw.text((12, 12), "no pair was kept", fill="black")
    for place, pair in enumerate(pairs):
        _draw_cell(sheet, draw, pair, (place % COLUMNS) * CELL[0], (place // COLUMNS) * CELL[1])
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, pair: dict[str, typing.Any], x: int, y: int) -> None:
    font, small = ImageFont.load_default(11), ImageFont.load_default(9)
    for i, name in enumerate(("original_image", "edited_image")):
        with Image.open(io.BytesIO(pair[name]["bytes"])) as picture:
            sheet.paste(thumbnail(picture.convert("RGB"), THUMB), (x + 8 + i * (THUMB + 8), y + 8))
    top = y + THUMB + 12
    draw.text((x + 8, top), fitted_text(pair["instruction"], font), fill="black", font=font)
    draw.text((x + 8, top + 15), fitted_text(pair["caption"], small), fill="#555555", font=small)
    scores = (
        f"direction {pair['sim_direction']:.2f}  image {pair['sim_image']:.2f}  texts {pair['sim_original']:.2f} "
        f"{pair['sim_edited']:.2f}  p {pair['p2p_threshold']:.2f}"
    )
    draw.text((x + 8, top + 28), fitted_text(scores, small), fill="#555555", font=small)


def thumbnail(picture: Image.Image, side: int) -> Image.Image:
    """``picture`` in a white square of ``side`` pixels; small ones keep their pixels, enlarged."""
    smooth = max(picture.size) > side
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return ImageOps.pad(picture, (side, side), method, color="white")


def fitted_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float = CELL[0] - 16) -> str:
    """``text`` cut to ``room`` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
