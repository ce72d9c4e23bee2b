"""What a postcard shows: its named attributes, its unspoken layout, and how both are drawn at random.

A caption names the attributes and never the layout. The layout's distribution depends on every attribute, as in
photographs, so that two pictures of different captions drift apart unless something ties them together: that is the
problem Prompt-to-Prompt solves, and a world without it would have nothing to solve.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

OBJECTS = (
    "boat", "house", "castle", "tree", "car", "lighthouse", "windmill", "tent", "balloon", "rocket", "mushroom",
    "train",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
GROUNDS = ("grass", "sand", "snow", "water", "leaves")
SKIES = ("day", "sunset", "night", "overcast", "dawn")
STYLES = ("photo", "pencil", "watercolour", "pixel", "comic")
EXTRAS = ("moon", "rainbow", "birds", "snowfall", "flag")

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Layout:
    """Where things are, in units of the picture's side; y grows downwards.

    ``horizon`` 0.40–0.78, ``object_x`` 0.22–0.78, ``object_size`` 0.36–0.70 (height of the object's unit box),
    ``depth`` 0–1 (how far in front of the horizon it stands), ``facing`` +1 right, -1 left, ``extra_x`` 0.12–0.88
    (where moon, birds and flag go), ``detail_seed`` (stars, clouds, hills, brush marks).
    """

    horizon: float
    object_x: float
    object_size: float
    depth: float
    facing: int
    extra_x: float
    detail_seed: int


@dataclass(frozen=True)
class Scene:
    """One postcard. ``extras`` is sorted and has no duplicates."""

    object: str
    colour: str
    ground: str
    sky: str
    style: str
    extras: tuple[str, ...]
    layout: Layout

    def with_(self, **attributes: Any) -> Scene:
        """The same layout with other attributes: the exact answer to an edit."""
        return replace(self, **attributes)

    def attributes(self) -> dict[str, Any]:
        return {
            "object": self.object, "colour": self.colour, "ground": self.ground, "sky": self.sky,
            "style": self.style, "extras": list(self.extras),
        }  # fmt: skip


def is_held_out(object_: str, colour: str, style: str) -> bool:
    """Whether the combination never appears in training data (about 10 % of the 480, chosen by hash)."""
    digest = hashlib.blake2b(f"{object_}|{colour}|{style}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


# Every shift is one to two deviations of the noise beside it: an edit alone moves things visibly, yet the edited
# attributes at the old layout remain a picture that this world draws. Prompt-to-Prompt holds a place well and the
# horizon hardly (what a word adds to every latent moves it), so the sky moves it least.
_HORIZON = {"day": 0.57, "sunset": 0.60, "night": 0.63, "overcast": 0.55, "dawn": 0.585}
_HORIZON_NOISE = 0.05
_OBJECT_X = {
    "boat": -0.12, "house": 0.08, "castle": 0.0, "tree": -0.10, "car": -0.06, "lighthouse": 0.13,
    "windmill": 0.07, "tent": -0.06, "balloon": 0.04, "rocket": -0.03, "mushroom": 0.10, "train": 0.01,
}  # fmt: skip
_GROUND_X = {"grass": 0.0, "sand": 0.07, "snow": 0.05, "water": -0.07, "leaves": -0.05}
_SKY_X = {"day": -0.05, "sunset": 0.05, "night": 0.0, "overcast": -0.03, "dawn": 0.04}
_STYLE_X = {"photo": 0.0, "pencil": -0.05, "watercolour": 0.05, "pixel": 0.03, "comic": -0.04}
_OBJECT_X_NOISE = 0.07
_OBJECT_SIZE = {
    "boat": 0.46, "house": 0.48, "castle": 0.62, "tree": 0.56, "car": 0.44, "lighthouse": 0.66,
    "windmill": 0.62, "tent": 0.44, "balloon": 0.52, "rocket": 0.60, "mushroom": 0.46, "train": 0.50,
}  # fmt: skip
_COLOUR_X = {
    "red": 0.07, "orange": 0.05, "yellow": 0.03, "green": -0.05, "blue": -0.07, "purple": -0.03, "pink": 0.06,
    "white": -0.06,
}  # fmt: skip
_GROUND_DEPTH = {"grass": 0.40, "sand": 0.25, "snow": 0.50, "water": 0.15, "leaves": 0.60}
_GROUND_SIZE = {"grass": 1.0, "sand": 0.92, "snow": 1.05, "water": 0.95, "leaves": 1.08}
_STYLE_SIZE = {"photo": 1.0, "pencil": 0.92, "watercolour": 0.96, "pixel": 1.05, "comic": 1.10}
_FACES_RIGHT = {"boat": 0.8, "car": 0.3, "train": 0.7}
_EXTRA_SHIFT = {"moon": 0.05, "rainbow": -0.06, "birds": 0.05, "snowfall": -0.05, "flag": -0.06}


def sample_layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """Draw a layout from the prior that the scene's attributes imply (``scene.layout`` is not read)."""
    horizon = _HORIZON[scene.sky] + (0.03 if scene.ground == "water" else 0.0) + rng.normal(0, _HORIZON_NOISE)
    shift = _OBJECT_X[scene.object] + _COLOUR_X[scene.colour] + _GROUND_X[scene.ground] + _SKY_X[scene.sky]
    shift += _STYLE_X[scene.style] + sum(_EXTRA_SHIFT[extra] for extra in scene.extras)
    shift += rng.normal(0, _OBJECT_X_NOISE)
    # Bounded smoothly: a hard bound would pile pictures up at both ends.
    object_x = 0.5 + 0.28 * np.tanh(shift / 0.28)
    size = _OBJECT_SIZE[scene.object] * _GROUND_SIZE[scene.ground] * _STYLE_SIZE[scene.style]
    size *= np.exp(rng.normal(0, 0.07))
    depth = _GROUND_DEPTH[scene.ground] + rng.normal(0, 0.12)
    faces_right = rng.random() < _FACES_RIGHT.get(scene.object, 0.5)
    # Moon, birds and flag stand on the roomier side of the object.
    side = -1 if object_x > 0.5 else 1
    extra_x = object_x + side * rng.uniform(0.28, 0.42)
    return Layout(
        horizon=float(np.clip(horizon, 0.40, 0.78)),
        object_x=float(object_x),
        object_size=float(np.clip(size, 0.36, 0.70)),
        depth=float(np.clip(depth, 0.0, 1.0)),
        facing=1 if faces_right else -1,
        extra_x=float(np.clip(extra_x, 0.12, 0.88)),
        detail_seed=int(rng.integers(2**31)),
    )


_NO_LAYOUT = Layout(0.55, 0.5, 0.5, 0.4, 1, 0.85, 0)


def sample_scene(rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """Draw a scene. ``held_out`` False: only combinations seen in training; True: only held-out ones; None: any."""
    while True:
        object_, colour, style = (str(rng.choice(names)) for names in (OBJECTS, COLOURS, STYLES))
        if held_out is None or is_held_out(object_, colour, style) == held_out:
            break
    count = int(rng.choice(3, p=(0.45, 0.40, 0.15)))
    extras = tuple(sorted(str(extra) for extra in rng.choice(EXTRAS, size=count, replace=False)))
    scene = Scene(object_, colour, str(rng.choice(GROUNDS)), str(rng.choice(SKIES)), style, extras, _NO_LAYOUT)
    return scene.with_(layout=sample_layout(scene, rng))
