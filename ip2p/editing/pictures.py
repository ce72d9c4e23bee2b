"""Any picture a person may have, as upright 8-bit RGB. Sizes and edits are elsewhere.

PNG, JPEG and WebP are read; of a transparent picture its look on white, of 16-bit greys all of their range, and the
rotation that a camera noted is done. Metadata is left behind.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ip2p.errors import InputError
from ip2p.storage import read_file

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 100_000_000
"""About the largest that cameras make; a small file can claim to hold far more."""


def read_picture(uri: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in a local or ``s3://`` file, ``(H, W, 3)`` uint8.

    Raises StorageError where the file cannot be read, InputError where it holds no picture that can be used.
    """
    return decode_picture(read_file(str(uri)), str(uri), max_pixels)


def decode_picture(data: bytes, name: str = "picture", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in ``data``, ``(H, W, 3)`` uint8; ``name`` is what errors call it.

    Raises InputError for another format, a damaged file, an animation, or more than ``max_pixels`` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check(picture, name, max_pixels)
            return upright_rgb(picture)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their format's parser raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: not a whole {', '.join(FORMATS)} picture ({reason}); save it again") from error


def upright_rgb(picture: Image.Image) -> np.ndarray:
    """A loaded picture of any mode as ``(H, W, 3)`` uint8, turned as its EXIF orientation says."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would cut them off at 255
        grey = np.rint(np.asarray(turned, np.float64).clip(0, 65535) / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if turned.mode == "F":
        raise InputError("a picture of floats has no fixed range; save it with 8 or 16 bits a channel")
    if turned.has_transparency_data:
        coloured = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return np.asarray(turned.convert("RGB"))


def _check(picture: Image.Image, name: str, max_pixels: int) -> None:
    """What the header says is looked at before a single pixel is decoded."""
    if picture.width * picture.height > max_pixels:
        found = f"{picture.width} x {picture.height} pixels"
        raise InputError(f"{name}: found {found}, expected at most {max_pixels} in all; make it smaller first")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        raise InputError(f"{name}: found an animation of {frames} frames, expected one picture; save one of them")
