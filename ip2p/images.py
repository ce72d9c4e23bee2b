"""Pictures as bytes and back, with the metadata that Hugging Face readers look for."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

CARRIED = "ip2p"
FORMATS = ("png", "jpeg", "webp")


def encode_image(pixels: np.ndarray, image_format: str = "png", quality: int = 95, about: str = "") -> bytes:
    """Encode ``(H, W, 3)`` uint8 as one of FORMATS. PNG and WebP of quality 100 lose nothing; JPEG is 4:4:4.

    ``about`` is ASCII text that the file carries: PNG as the text chunk "ip2p", JPEG and WebP as EXIF's
    ImageDescription.
    """
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if image_format == "png":
        chunk = PngImagePlugin.PngInfo()
        if about:
            chunk.add_text(CARRIED, about)
        picture.save(buffer, "PNG", compress_level=6, pnginfo=chunk)
    elif image_format == "jpeg":
        picture.save(buffer, "JPEG", quality=quality, subsampling=0, exif=_exif(about))
    elif image_format == "webp":
        picture.save(buffer, "WEBP", quality=quality, lossless=quality == 100, exif=_exif(about))
    else:
        raise ValueError(f"unknown image format {image_format!r}; known: {', '.join(FORMATS)}")
    return buffer.getvalue()


def carried_text(data: bytes) -> str:
    """The text that ``encode_image`` put into a file, or empty."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
        return str(picture.info.get(CARRIED) or picture.getexif().get(ExifTags.Base.ImageDescription, ""))


def _exif(about: str) -> bytes:
    exif = Image.Exif()
    if about:
        exif[ExifTags.Base.ImageDescription] = about
    return exif.tobytes() if about else b""


def decode_image(data: bytes) -> np.ndarray:
    """Decode PNG, JPEG or WebP to ``(H, W, 3)`` uint8."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
        return np.asarray(picture.convert("RGB"))


def square(pixels: np.ndarray, side: int, chance: float = 0.5) -> np.ndarray:
    """``(H, W, 3)`` uint8 to ``(side, side, 3)``: the longer side is cropped, then Lanczos. Nothing is stretched.

    ``chance``, 0..1, is where the crop lies: 0 left or top, 0.5 in the middle.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    # Whole pixels: where nothing has to be resized, nothing is resampled.
    left, top = round(chance * (width - short)), round(chance * (height - short))
    box = (left, top, left + short, top + short)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS, box=box))


def to_uint8(unit: np.ndarray) -> np.ndarray:
    """``[0, 1]`` float to 0..255, rounded to nearest (the original truncates, which darkens by half a step)."""
    return np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)
