"""Five manners of drawing the same scene, applied to the oversampled canvas."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageFilter

PAPER = np.array((247, 241, 226), np.float32)
PIXEL_BLOCKS = 20


def outline_width(style: str, side: int) -> int:
    """Width of outlines in canvas pixels: comics are drawn with a brush, photographs have none to speak of."""
    share = {"photo": 0.008, "pencil": 0.016, "watercolour": 0.008, "pixel": 0.03, "comic": 0.034}[style]
    return round(share * side)


def apply_style(canvas: Image.Image, style: str, size: int, detail_seed: int) -> np.ndarray:
    """Finish ``canvas`` (side a multiple of ``size``) as ``(size, size, 3)`` uint8."""
    return _FINISH[style](canvas, size, detail_seed)


def _reduced(canvas: Image.Image, size: int) -> np.ndarray:
    return np.asarray(canvas.reduce(canvas.width // size), np.float32)


def _photo(canvas: Image.Image, size: int, detail_seed: int) -> np.ndarray:
    """Soft corners, as a lens leaves them."""
    return _bytes(_reduced(canvas, size) * _vignette(size))


def _pencil(canvas: Image.Image, size: int, detail_seed: int) -> np.ndarray:
    """Coloured pencil pressed hard: paper shines through diagonal hatching, ink lines stay."""
    picture = _vivid(_reduced(canvas, size))
    ink = np.clip((64 - picture.max(axis=2, keepdims=True)) / 24, 0, 1)
    strength = (0.70 + 0.15 * _hatching(size))[..., None]
    return _bytes(PAPER + (picture - PAPER) * np.maximum(strength, 0.9 * ink))


def _watercolour(canvas: Image.Image, size: int, detail_seed: int) -> np.ndarray:
    """Wet edges, uneven pigment, and a white ragged margin of unpainted paper."""
    soft = canvas.filter(ImageFilter.GaussianBlur(0.012 * canvas.width))
    picture = _reduced(soft, size)
    pigment = 0.80 + 0.16 * _blotches(detail_seed % 64, size)[..., None]
    painted = PAPER + (picture - PAPER) * pigment
    margin = _margin(detail_seed % 64, size)[..., None]
    return _bytes(PAPER + (painted - PAPER) * margin)


def _pixel(canvas: Image.Image, size: int, detail_seed: int) -> np.ndarray:
    """A coarse grid of blocks in a small palette."""
    coarse = canvas.resize((PIXEL_BLOCKS, PIXEL_BLOCKS), Image.Resampling.BOX)
    levels = np.rint(np.asarray(coarse, np.float32) / 42.5) * 42.5
    blocks = Image.fromarray(_bytes(levels)).resize((size, size), Image.Resampling.NEAREST)
    return np.array(blocks)


def _comic(canvas: Image.Image, size: int, detail_seed: int) -> np.ndarray:
    """Saturated flat colour inside a black panel frame."""
    vivid = _vivid(_reduced(canvas, size))
    frame = max(1, round(size * 0.045))
    vivid[:frame] = vivid[-frame:] = 16
    vivid[:, :frame] = vivid[:, -frame:] = 16
    return _bytes(vivid)


def _vivid(picture: np.ndarray) -> np.ndarray:
    """A quarter more saturation."""
    grey = picture.mean(axis=2, keepdims=True)
    return np.clip(grey + (picture - grey) * 1.25, 0, 255)


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _vignette(size: int) -> np.ndarray:
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    return (1.06 - 0.20 * (ramp[:, None] ** 2 + ramp[None, :] ** 2) ** 1.2)[..., None]


@functools.lru_cache(maxsize=4)
def _hatching(size: int) -> np.ndarray:
    """Diagonal strokes, ±1, nine across the picture."""
    ramp = np.arange(size, dtype=np.float32) / size
    return np.sin((ramp[:, None] + ramp[None, :]) * 2 * np.pi * 9).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _blotches(seed: int, size: int) -> np.ndarray:
    """Smooth noise in 0..1."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 5)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


@functools.lru_cache(maxsize=256)
def _margin(seed: int, size: int) -> np.ndarray:
    """1 inside, falling to 0 over a ragged border."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    edge = np.minimum(ramp, 1 - ramp)
    distance = np.minimum(edge[:, None], edge[None, :]) - 0.045 + 0.03 * (_blotches(seed + 1000, size) - 0.5)
    return np.clip(distance / 0.03, 0, 1)


_FINISH = {"photo": _photo, "pencil": _pencil, "watercolour": _watercolour, "pixel": _pixel, "comic": _comic}
