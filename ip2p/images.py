"""Pictures as bytes and back, with the metadata that Hugging Face readers look for."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode_image(pixels: np.ndarray, image_format: str = "png") -> bytes:
    """Encode ``(H, W, 3)`` uint8. PNG is lossless; JPEG is quality 95 with full colour (4:4:4)."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if image_format == "jpeg":
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """Decode PNG, JPEG or WebP to ``(H, W, 3)`` uint8."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
        return np.asarray(picture.convert("RGB"))


def to_uint8(unit: np.ndarray) -> np.ndarray:
    """``[0, 1]`` float to 0..255, rounded to nearest (the original truncates, which darkens by half a step)."""
    return np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)
