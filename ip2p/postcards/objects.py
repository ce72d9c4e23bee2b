"""The twelve things a postcard can show. Each is one function of a pen, the body colour and its shade.

Most of each object's area carries the body colour, so that "a red castle" is red wherever one looks; the
silhouettes differ enough to be told apart in sixteen blocks (the pixel style).
"""

from __future__ import annotations

from ip2p.postcards.pen import INK, RGB, Pen, mix

WHITE: RGB = (250, 248, 240)
WOOD: RGB = (120, 80, 48)
STONE: RGB = (92, 88, 96)
GLASS: RGB = (150, 205, 230)


def boat(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.stroke([(0.0, 0.2), (0.0, 0.98)], WOOD, 0.05)
    pen.polygon([(0.04, 0.30), (0.42, 0.34), (0.04, 0.96)], body)
    pen.polygon([(-0.04, 0.30), (-0.34, 0.34), (-0.04, 0.84)], mix(body, WHITE, 0.45))
    pen.polygon([(-0.52, 0.24), (0.56, 0.24), (0.38, 0.0), (-0.36, 0.0)], shade)


def house(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.box(0.20, 0.62, 0.34, 0.96, STONE)
    pen.box(-0.42, 0.0, 0.42, 0.54, body)
    pen.polygon([(-0.56, 0.52), (0.0, 0.96), (0.56, 0.52)], shade)
    pen.box(-0.09, 0.0, 0.11, 0.32, WOOD)
    pen.box(-0.34, 0.22, -0.17, 0.40, GLASS)
    pen.box(0.19, 0.22, 0.36, 0.40, GLASS)


def castle(pen: Pen, body: RGB, shade: RGB) -> None:
    for x in (-0.40, 0.40):
        pen.box(x - 0.16, 0.0, x + 0.16, 0.80, shade)
        for tooth in (-0.13, 0.0, 0.13):
            pen.box(x + tooth - 0.045, 0.78, x + tooth + 0.045, 0.94, shade)
    pen.box(-0.26, 0.0, 0.26, 0.56, body)
    for tooth in (-0.18, 0.0, 0.18):
        pen.box(tooth - 0.05, 0.54, tooth + 0.05, 0.68, body)
    pen.dome(0.0, 0.18, 0.11, 0.14, INK)
    pen.box(-0.11, 0.0, 0.11, 0.18, INK)


def tree(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.box(-0.07, 0.0, 0.07, 0.42, WOOD)
    pen.ellipse(-0.20, 0.56, 0.22, 0.20, shade)
    pen.ellipse(0.20, 0.56, 0.22, 0.20, shade)
    pen.ellipse(0.0, 0.72, 0.27, 0.26, body)


def car(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.polygon([(-0.34, 0.34), (-0.22, 0.62), (0.20, 0.62), (0.36, 0.34)], shade)
    pen.polygon([(-0.24, 0.36), (-0.16, 0.55), (-0.01, 0.55), (-0.01, 0.36)], GLASS)
    pen.polygon([(0.05, 0.36), (0.05, 0.55), (0.15, 0.55), (0.25, 0.36)], GLASS)
    pen.polygon([(-0.60, 0.12), (-0.60, 0.36), (0.48, 0.36), (0.64, 0.28), (0.64, 0.12)], body)
    for x in (-0.33, 0.36):
        pen.ellipse(x, 0.12, 0.15, 0.15, INK)
        pen.ellipse(x, 0.12, 0.06, 0.06, (190, 190, 196))


def lighthouse(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.polygon([(-0.20, 0.0), (0.20, 0.0), (0.12, 0.74), (-0.12, 0.74)], body)
    for low, high in ((0.16, 0.32), (0.46, 0.60)):
        pen.polygon([(-0.20 + 0.108 * low, low), (0.20 - 0.108 * low, low),
                     (0.20 - 0.108 * high, high), (-0.20 + 0.108 * high, high)], WHITE)  # fmt: skip
    pen.box(-0.17, 0.74, 0.17, 0.79, INK)
    pen.box(-0.10, 0.79, 0.10, 0.91, (255, 236, 140))
    pen.polygon([(-0.15, 0.90), (0.0, 1.02), (0.15, 0.90)], shade)


def windmill(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.polygon([(-0.27, 0.0), (0.27, 0.0), (0.15, 0.62), (-0.15, 0.62)], body)
    pen.dome(0.0, 0.60, 0.18, 0.16, shade)
    pen.box(-0.07, 0.0, 0.07, 0.22, WOOD)
    for x, y in ((0.42, 0.36), (-0.36, 0.42), (-0.42, -0.36), (0.36, -0.42)):
        pen.stroke([(0.0, 0.62), (x, 0.62 + y)], WOOD, 0.05)
        pen.polygon([(0.22 * x, 0.62 + 0.22 * y), (x, 0.62 + y), (0.95 * x - 0.32 * y, 0.62 + 0.95 * y + 0.32 * x),
                     (0.22 * x - 0.28 * y, 0.62 + 0.22 * y + 0.28 * x)], WHITE)  # fmt: skip


def tent(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.polygon([(-0.62, 0.0), (0.0, 0.82), (0.62, 0.0)], body)
    pen.polygon([(-0.20, 0.0), (0.0, 0.60), (0.20, 0.0)], INK)
    pen.polygon([(-0.20, 0.0), (0.0, 0.60), (-0.32, 0.0)], shade)


def balloon(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.stroke([(-0.22, 0.46), (-0.08, 0.16)], INK, 0.03)
    pen.stroke([(0.22, 0.46), (0.08, 0.16)], INK, 0.03)
    pen.box(-0.11, 0.0, 0.11, 0.16, WOOD)
    pen.ellipse(0.0, 0.68, 0.37, 0.36, body)
    pen.ellipse(0.0, 0.68, 0.15, 0.36, mix(body, WHITE, 0.5))


def rocket(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.polygon([(-0.14, 0.10), (-0.36, -0.02), (-0.14, 0.42)], shade)
    pen.polygon([(0.14, 0.10), (0.36, -0.02), (0.14, 0.42)], shade)
    pen.polygon([(-0.09, 0.06), (0.0, -0.10), (0.09, 0.06)], (255, 190, 60))
    pen.polygon([(-0.16, 0.06), (0.16, 0.06), (0.18, 0.58), (0.0, 1.02), (-0.18, 0.58)], body)
    pen.ellipse(0.0, 0.54, 0.09, 0.09, GLASS)


def mushroom(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.polygon([(-0.16, 0.0), (0.16, 0.0), (0.12, 0.46), (-0.12, 0.46)], (244, 230, 204))
    pen.dome(0.0, 0.40, 0.50, 0.48, body)
    for x, y, r in ((-0.26, 0.54, 0.07), (0.03, 0.70, 0.08), (0.26, 0.53, 0.06)):
        pen.ellipse(x, y, r, r, WHITE if body != WHITE else (214, 206, 196))


def train(pen: Pen, body: RGB, shade: RGB) -> None:
    pen.box(0.34, 0.50, 0.48, 0.82, INK)
    pen.box(-0.62, 0.14, -0.06, 0.78, body)
    pen.box(-0.66, 0.76, -0.02, 0.86, shade)
    pen.box(-0.06, 0.14, 0.56, 0.52, shade)
    pen.box(-0.52, 0.46, -0.20, 0.66, GLASS)
    pen.polygon([(0.56, 0.14), (0.70, 0.06), (0.56, 0.40)], STONE)
    for x in (-0.48, -0.20, 0.12, 0.42):
        pen.ellipse(x, 0.10, 0.12, 0.12, INK)


DRAW = {
    "boat": boat, "house": house, "castle": castle, "tree": tree, "car": car, "lighthouse": lighthouse,
    "windmill": windmill, "tent": tent, "balloon": balloon, "rocket": rocket, "mushroom": mushroom, "train": train,
}  # fmt: skip
