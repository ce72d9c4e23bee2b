"""Draws a scene: sky, ground, extras and object, in the light of the sky and the manner of the style.

Deterministic: the same scene and size give the same pixels. Flat colours and firm outlines are deliberate; they
survive an 8x autoencoder. At 64 pixels one core draws several hundred a second (``bench/postcards.py``).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ip2p.postcards import objects
from ip2p.postcards.pen import INK, RGB, Pen, mix
from ip2p.postcards.scene import Layout, Scene
from ip2p.postcards.styles import apply_style, outline_width

BODY: dict[str, RGB] = {
    "red": (214, 40, 44), "orange": (242, 128, 26), "yellow": (248, 212, 40), "green": (34, 158, 66),
    "blue": (38, 88, 214), "purple": (126, 52, 176), "pink": (246, 128, 186), "white": (246, 244, 238),
}  # fmt: skip
SKY: dict[str, tuple[RGB, RGB]] = {  # zenith, horizon
    "day": ((70, 150, 236), (186, 224, 250)), "sunset": ((206, 74, 62), (255, 186, 84)),
    "night": ((10, 14, 48), (38, 50, 104)), "overcast": ((136, 142, 150), (196, 200, 204)),
    "dawn": ((164, 140, 214), (252, 206, 218)),
}  # fmt: skip
GROUND: dict[str, tuple[RGB, RGB]] = {  # far, near
    "grass": ((124, 184, 78), (70, 136, 48)), "sand": ((240, 216, 156), (214, 178, 110)),
    "snow": ((244, 248, 255), (214, 226, 242)), "water": ((74, 156, 190), (24, 92, 146)),
    "leaves": ((198, 120, 44), (146, 74, 26)),
}  # fmt: skip
# What the light of each sky does to all that it falls on (per channel); the object keeps a little more of its colour.
LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.86, 0.76), "night": (0.46, 0.50, 0.68),
    "overcast": (0.84, 0.86, 0.88), "dawn": (1.0, 0.92, 0.97),
}  # fmt: skip
OVERSAMPLE = 2


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw ``scene`` as ``(size, size, 3)`` uint8 RGB; ``size`` in pixels, at least 16."""
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    side = size * OVERSAMPLE
    canvas = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(canvas)
    rng = np.random.default_rng(scene.layout.detail_seed)
    line = outline_width(scene.style, side)
    _paint_sky(draw, scene, side, rng)
    if "rainbow" in scene.extras:
        _paint_rainbow(draw, scene, side)
    if "moon" in scene.extras:
        _paint_moon(draw, scene.layout, side, line)
    _paint_ground(draw, scene, side, rng)
    if "snowfall" in scene.extras:
        _paint_snowfall(draw, side)
    _paint_object(draw, scene, side, line)
    if "flag" in scene.extras:
        _paint_flag(draw, scene, side, line)
    if "birds" in scene.extras:
        _paint_birds(draw, scene, side)
    return apply_style(canvas, scene.style, size, scene.layout.detail_seed)


def lit(colour: RGB, sky: str, keep: float = 0.0) -> RGB:
    """``colour`` in the light of ``sky``; ``keep`` 0..1 is the share that the light leaves alone."""
    red, green, blue = (round(c * (f + (1 - f) * keep)) for c, f in zip(colour, LIGHT[sky], strict=True))
    return red, green, blue


def _bands(draw: ImageDraw.ImageDraw, top: float, bottom: float, side: int, ends: tuple[RGB, RGB]) -> None:
    first, last = round(top * side), round(bottom * side)
    for y in range(first, last):
        draw.line((0, y, side, y), fill=mix(ends[0], ends[1], (y - first) / max(1, last - first - 1)))


def _paint_sky(draw: ImageDraw.ImageDraw, scene: Scene, side: int, rng: np.random.Generator) -> None:
    horizon = scene.layout.horizon
    _bands(draw, 0.0, horizon + 0.02, side, SKY[scene.sky])
    if scene.sky == "night":
        for x, y in rng.uniform(0, 1, (10, 2)):
            r = 0.009 * side
            cx, cy = x * side, y * horizon * side * 0.9
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(236, 236, 210))
    elif scene.sky == "sunset":
        r, cx, cy = 0.15 * side, (1.0 - scene.layout.object_x) * side, horizon * side
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(255, 232, 128))
    elif scene.sky == "overcast":
        _paint_clouds(draw, horizon, side, rng, (226, 228, 230), 4)
    elif scene.sky == "day":
        _paint_clouds(draw, horizon, side, rng, (252, 253, 255), 2)


def _paint_clouds(
    draw: ImageDraw.ImageDraw, horizon: float, side: int, rng: np.random.Generator, fill: RGB, count: int
) -> None:
    for x, y in rng.uniform(0, 1, (count, 2)):
        cx, cy = x * side, (0.10 + 0.55 * y) * horizon * side
        for dx, rx, ry in ((-0.07, 0.09, 0.04), (0.07, 0.10, 0.04), (0.0, 0.08, 0.06)):
            draw.ellipse((cx + (dx - rx) * side, cy - ry * side, cx + (dx + rx) * side, cy + ry * side), fill=fill)


def _paint_ground(draw: ImageDraw.ImageDraw, scene: Scene, side: int, rng: np.random.Generator) -> None:
    horizon = scene.layout.horizon
    far, near = (lit(colour, scene.sky) for colour in GROUND[scene.ground])
    _bands(draw, horizon, 1.0, side, (far, near))
    marks = rng.uniform(0, 1, (10, 2))
    depth = 1.0 - horizon
    for x, y in marks:
        cx, cy, grow = x * side, (horizon + depth * (0.08 + 0.9 * y)) * side, 0.5 + y
        _paint_mark(draw, scene, cx, cy, side * 0.024 * grow, far, near)


def _paint_mark(draw: ImageDraw.ImageDraw, scene: Scene, cx: float, cy: float, r: float, far: RGB, near: RGB) -> None:
    """One tuft, ripple, drift or leaf: what tells the grounds apart besides their colour."""
    if scene.ground == "grass":
        draw.line((cx, cy, cx, cy - 2.2 * r), fill=mix(near, (0, 40, 0), 0.4), width=max(1, round(r * 0.8)))
    elif scene.ground == "water":
        draw.line((cx - 3 * r, cy, cx + 3 * r, cy), fill=mix(far, (255, 255, 255), 0.45), width=max(1, round(r * 0.8)))
    elif scene.ground == "sand":
        draw.arc(
            (cx - 4 * r, cy - r, cx + 4 * r, cy + 2 * r), 190, 350, fill=mix(near, INK, 0.2), width=max(1, round(r / 2))
        )
    elif scene.ground == "snow":
        draw.ellipse((cx - 3 * r, cy - r * 0.8, cx + 3 * r, cy + r * 0.8), fill=mix(far, (255, 255, 255), 0.5))
    else:
        fill = lit(((232, 168, 40), (190, 60, 30))[int(cx) % 2], scene.sky)
        draw.ellipse((cx - 1.6 * r, cy - r, cx + 1.6 * r, cy + r), fill=fill)


def _paint_object(draw: ImageDraw.ImageDraw, scene: Scene, side: int, line: int) -> None:
    layout = scene.layout
    body = lit(BODY[scene.colour], scene.sky, keep=0.5)
    base = layout.horizon + (0.06 + 0.34 * layout.depth) * (1.0 - layout.horizon)
    base = max(base, layout.object_size + 0.04)
    if scene.object == "balloon":
        base = max(layout.object_size + 0.03, base - 0.16)
    pen = Pen(draw, layout.object_x * side, base * side, layout.object_size * side, layout.facing, line)
    objects.DRAW[scene.object](pen, body, mix(body, INK, 0.22))


def _paint_moon(draw: ImageDraw.ImageDraw, layout: Layout, side: int, line: int) -> None:
    r, cx, cy = 0.095 * side, layout.extra_x * side, 0.17 * side
    draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(255, 250, 214), outline=INK, width=max(1, line // 2))
    for dx, dy, k in ((-0.35, -0.2, 0.25), (0.3, 0.25, 0.3)):
        x, y, q = cx + dx * r, cy + dy * r, k * r
        draw.ellipse((x - q, y - q, x + q, y + q), fill=(216, 208, 168))


def _paint_rainbow(draw: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    horizon, width = scene.layout.horizon * side, 0.045 * side
    cx = (0.5 + 0.25 * (scene.layout.extra_x - 0.5)) * side
    radius = min(0.52 * side, horizon - 0.02 * side)
    for i, colour in enumerate(((226, 48, 48), (250, 204, 46), (52, 178, 84), (86, 84, 214))):
        r = radius - i * width
        draw.arc((cx - r, horizon - r, cx + r, horizon + r), 180, 360, fill=lit(colour, scene.sky, 0.5),
                 width=round(width) + 1)  # fmt: skip


def _paint_flag(draw: ImageDraw.ImageDraw, scene: Scene, side: int, line: int) -> None:
    layout = scene.layout
    base = layout.horizon + 0.55 * (1.0 - layout.horizon)
    pen = Pen(draw, layout.extra_x * side, base * side, 0.36 * side, 1 if layout.extra_x < 0.5 else -1, line)
    pen.stroke([(0.0, 0.0), (0.0, 1.0)], objects.WOOD, 0.09)
    stripes = ((206, 40, 60), (250, 248, 240), (206, 40, 60))
    for i, colour in enumerate(stripes):
        pen.box(0.04, 0.52 + 0.15 * i, 0.52, 0.67 + 0.15 * i, lit(colour, scene.sky, 0.35))


def _paint_birds(draw: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    # Birds fly on the side away from the moon, so that both can be seen.
    x0 = (1.0 - scene.layout.extra_x) * side
    ink = INK if scene.sky != "night" else (206, 206, 220)
    for dx, dy in ((0.0, 0.10), (0.15, 0.17), (-0.14, 0.20)):
        cx, cy, w = x0 + dx * side, dy * side, 0.065 * side
        wings = [(cx - w, cy - 0.6 * w), (cx - 0.4 * w, cy - 0.7 * w), (cx, cy), (cx + 0.4 * w, cy - 0.7 * w),
                 (cx + w, cy - 0.6 * w)]  # fmt: skip
        draw.line(wings, fill=ink, width=max(1, round(0.028 * side)), joint="curve")


def _paint_snowfall(draw: ImageDraw.ImageDraw, side: int) -> None:
    # Always in the same places, one flake to each latent of the 8x autoencoder: it erases flakes strewn at random,
    # for their places are more than its latents hold.
    step, r = side / 8, 0.025 * side
    for row in range(8):
        for column in range(8):
            x, y = (column + 0.25 + 0.5 * (row % 2)) * step, (row + 0.5) * step
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255), outline=(190, 200, 214))
