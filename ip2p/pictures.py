"""Any picture a person may have, as upright 8-bit RGB. Sizes and edits are elsewhere.

PNG, JPEG and WebP are read; of a transparent picture its look on white, of 16-bit greys all of their range, colours as
its ICC profile means them, and the rotation that a camera noted is done. Metadata is left behind. Every entrance of the
project reads foreign pictures here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ip2p.errors import PictureError
from ip2p.storage import read_file

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 100_000_000
"""About the largest that cameras make; a small file can claim to hold far more."""
MIN_SIDE = 8
"""Pixels; there is nothing to edit in less."""
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")


def read_picture(uri: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in a local or ``s3://`` file, ``(H, W, 3)`` uint8.

    Raises StorageError where the file cannot be read, PictureError where it holds no picture that can be used.
    """
    return decode_picture(read_file(str(uri)), str(uri), max_pixels)


def decode_picture(data: bytes, name: str = "picture", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in ``data``, ``(H, W, 3)`` uint8; ``name`` is what errors call it.

    Raises PictureError for another format, a damaged file, an animation, too few or more than ``max_pixels`` pixels.
    """
    return _decoded(data, name, max_pixels, upright_rgb)


def decode_mask(data: bytes, name: str = "mask", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Where to edit, ``(H, W)`` uint8: 255 = edit, 0 = keep. Raises PictureError as ``decode_picture``.

    Two customs are understood: what is transparent is to be edited (OpenAI's), or, where nothing is transparent, what
    is white (diffusers').
    """
    return _decoded(data, name, max_pixels, _mask_of)


def _mask_of(picture: Image.Image) -> np.ndarray:
    if picture.has_transparency_data:
        alpha = np.asarray(ImageOps.exif_transpose(picture).convert("RGBA"))[:, :, 3]
        if alpha.min() < 255:
            return 255 - alpha
    return np.asarray(Image.fromarray(upright_rgb(picture)).convert("L"))


def _decoded(data: bytes, name: str, max_pixels: int, pixels_of: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    if not data.startswith(MAGIC):
        found, kind = ("another format", "format") if data else ("an empty file", "damaged")
        raise PictureError(f"{name}: found {found}, expected a {', '.join(FORMATS)} picture; save it as PNG", kind)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check(picture, name, max_pixels)
            return pixels_of(picture)
    except PictureError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their format's parser raises
        # A header that claims far more pixels than any picture has never gets as far as _check.
        kind = "size" if isinstance(error, Image.DecompressionBombError) else "damaged"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PictureError(
            f"{name}: not a whole {', '.join(FORMATS)} picture ({reason}); save it again", kind
        ) from error


def upright_rgb(picture: Image.Image) -> np.ndarray:
    """A loaded picture of any mode as ``(H, W, 3)`` uint8, turned as its EXIF orientation says."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would cut them off at 255
        grey = np.rint(np.asarray(turned, np.float64).clip(0, 65535) / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if turned.mode == "F":
        raise PictureError("a picture of floats has no fixed range; save it with 8 or 16 bits a channel", "format")
    if turned.has_transparency_data:
        coloured = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return np.asarray(_in_srgb(turned, picture.info.get("icc_profile")))


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """As RGB; colours as ``profile`` means them, where it can be read and is for pictures of this mode."""
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            return picture.convert("RGB")  # what every viewer does with a profile that it cannot read
        if converted is not None:
            return converted
    return picture.convert("RGB")


def _check(picture: Image.Image, name: str, max_pixels: int) -> None:
    """What the header says is looked at before a single pixel is decoded."""
    size = f"{picture.width} x {picture.height} pixels"
    if picture.width * picture.height > max_pixels:
        raise PictureError(f"{name}: found {size}, expected at most {max_pixels} in all; make it smaller first", "size")
    if min(picture.size) < MIN_SIDE:
        raise PictureError(f"{name}: found {size}, expected at least {MIN_SIDE} a side; make it larger first")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a photo and its small or second view, as phones write them
        found = f"an animation of {frames} frames"
        raise PictureError(f"{name}: found {found}, expected one picture; save one of them", "format")
