"""The size at which a picture is edited, and the way back to its own (``edit_cli.py`` of the original).

The short side becomes the next multiple of 64 pixels and the long side the last one that the aspect ratio allows, so
that the long side may exceed the resolution. All of it is integer arithmetic: the original's floats lose 64 pixels on
some sizes (354 x 306 comes out as 512 x 384 and should be 512 x 448). Pictures are never stretched.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

from ip2p.errors import InputError

MAX_ASPECT = 8
"""Longer pictures are refused: the rule would make a 1000 x 10 picture 6400 pixels wide."""

Size = tuple[int, int]
"""Width and height in pixels."""

Box = tuple[int, int, int, int]
"""Left, upper, right and lower, in pixels."""


@dataclass(frozen=True)
class Fitted:
    """A picture at the size of its edit, and where its pixels came from."""

    pixels: np.ndarray  # (h, w, 3) uint8
    original: np.ndarray  # (H, W, 3) uint8
    inside: Box  # the part of ``pixels`` that shows the picture; the rest is padding
    seen: Box  # the part of ``original`` that ``inside`` shows


def working_size(width: int, height: int, resolution: int = 512, multiple: int = 64) -> Size:
    """Width and height at which a ``width`` x ``height`` picture is edited, both multiples of ``multiple``.

    ``multiple`` is what the model's down-sampling asks for: 64 for Stable Diffusion. Raises InputError for a picture
    without pixels or more than MAX_ASPECT times as long as it is broad, and for a resolution below ``multiple``.
    """
    short, long = sorted((width, height))
    if short < 1 or long > MAX_ASPECT * short:
        raise InputError(
            f"picture of {width} x {height} pixels: sides of up to {MAX_ASPECT} to 1 can be edited; crop it first"
        )
    if resolution < multiple:
        raise InputError(f"resolution {resolution} is too small, this model needs at least {multiple}")
    units = -(-short * resolution // (long * multiple))
    short_side, long_side = units * multiple, long * units // short * multiple
    return (long_side, short_side) if width >= height else (short_side, long_side)


def fit(picture: np.ndarray, resolution: int, multiple: int, whole: bool) -> Fitted:
    """``picture`` at its working size: nothing cut off (``whole``), or nothing added. Raises as ``working_size``."""
    size = working_size(picture.shape[1], picture.shape[0], resolution, multiple)
    return pad_to(picture, size) if whole else crop_to(picture, size)


def crop_to(picture: np.ndarray, size: Size) -> Fitted:
    """Scale to cover ``size`` and cut the rest off evenly on both sides, by Lanczos as in the original."""
    height, width = picture.shape[:2]
    scale = max(Fraction(size[0], width), Fraction(size[1], height))
    left, upper = (width - size[0] / scale) / 2, (height - size[1] / scale) / 2
    box = (left, upper, width - left, height - upper)
    pixels = _resized(picture, size, (float(left), float(upper), float(box[2]), float(box[3])))
    seen = (round(left), round(upper), round(box[2]), round(box[3]))
    return Fitted(pixels, picture, (0, 0, *size), seen)


def pad_to(picture: np.ndarray, size: Size) -> Fitted:
    """Scale to fit inside ``size`` and repeat the outermost pixels around it, so that nothing is cut off."""
    height, width = picture.shape[:2]
    scale = min(Fraction(size[0], width), Fraction(size[1], height))
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, upper = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    margins = ((upper, size[1] - inner[1] - upper), (left, size[0] - inner[0] - left), (0, 0))
    pixels = np.pad(_resized(picture, inner), margins, mode="edge")
    return Fitted(pixels, picture, (left, upper, left + inner[0], upper + inner[1]), (0, 0, width, height))


def restore(edited: np.ndarray, fitted: Fitted) -> np.ndarray:
    """``edited``, of the size of ``fitted.pixels``, at the input's size; what the edit did not see stays as it was."""
    if edited.shape != fitted.pixels.shape:
        raise ValueError(f"edited picture has shape {edited.shape}, expected {fitted.pixels.shape}")
    (x0, y0, x1, y1), (left, upper, right, lower) = fitted.inside, fitted.seen
    restored = fitted.original.copy()
    # Cut out first: Lanczos given a box would look beyond it, into the padding.
    restored[upper:lower, left:right] = _resized(edited[y0:y1, x0:x1], (right - left, lower - upper))
    return restored


def _resized(picture: np.ndarray, size: Size, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, box=box))
