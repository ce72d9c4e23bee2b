"""Drawing in fractions: a pen that maps unit coordinates to an oversampled Pillow canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageDraw

Point = tuple[float, float]
RGB = tuple[int, int, int]

INK: RGB = (38, 34, 44)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """``a`` moved towards ``b`` by ``share`` (0..1)."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Pen:
    """Draws in a frame whose x runs -0.5..0.5 (mirrored when ``facing`` is -1) and y 0..1 upwards from the base.

    ``x``, ``y``: where the frame's base point lies, ``size``: the frame's side, all in pixels of the canvas.
    ``line``: width of outlines in pixels; 0 draws none.
    """

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    size: float
    facing: int = 1
    line: int = 2
    ink: RGB = INK

    def point(self, p: Point) -> Point:
        return (self.x + self.facing * p[0] * self.size, self.y - p[1] * self.size)

    def polygon(self, points: Sequence[Point], fill: RGB) -> None:
        places = [self.point(p) for p in points]
        self.draw.polygon(places, fill=fill)
        if self.line:
            self.draw.line([*places, places[0], places[1]], fill=self.ink, width=self.line, joint="curve")

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: RGB) -> None:
        cx, cy = self.point((x, y))
        rx, ry = rx * self.size, ry * self.size
        self.draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill, outline=self.ink, width=self.line)

    def dome(self, x: float, y: float, rx: float, ry: float, fill: RGB) -> None:
        """The upper half of an ellipse, standing on ``y``."""
        cx, cy = self.point((x, y))
        rx, ry = rx * self.size, ry * self.size
        self.draw.pieslice((cx - rx, cy - ry, cx + rx, cy + ry), 180, 360, fill=fill, outline=self.ink, width=self.line)

    def stroke(self, points: Sequence[Point], fill: RGB, width: float) -> None:
        """A line of ``width`` (in frame units)."""
        places = [self.point(p) for p in points]
        self.draw.line(places, fill=fill, width=max(1, round(width * self.size)), joint="curve")
