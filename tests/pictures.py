"""Small pictures for tests, as arrays and as files."""

from __future__ import annotations

import io
import typing

import numpy as np
from PIL import Image


def pixels(seed: int = 0, width: int = 16, height: int = 16) -> np.ndarray:
    """Random ones, ``(height, width, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(picture: np.ndarray | Image.Image, image_format: str = "PNG", **options: typing.Any) -> bytes:
    made, buffer = picture if isinstance(picture, Image.Image) else Image.fromarray(picture), io.BytesIO()
    made.save(buffer, image_format, **options)
    return buffer.getvalue()
