"""The drawn world: deterministic, exact in its edits, and with layouts that depend on what is shown."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ip2p.postcards.family.drawings import cached_drawings, scene_of
from ip2p.postcards.renderer import render
from ip2p.postcards.scene import (
    COLOURS,
    EXTRAS,
    GROUNDS,
    OBJECTS,
    SKIES,
    STYLES,
    is_held_out,
    sample_layout,
    sample_scene,
)


def scenes(count: int, held_out: bool | None = None):
    return [sample_scene(np.random.default_rng(i), held_out) for i in range(count)]


def test_world_is_as_large_as_promised():
    assert len(OBJECTS) >= 12
    assert len(COLOURS) >= 8
    assert len(GROUNDS) >= 4
    assert len(SKIES) >= 5
    assert len(STYLES) >= 5
    assert {"moon", "rainbow", "birds", "snowfall", "flag"} <= set(EXTRAS)


def test_same_scene_gives_the_same_pixels():
    for scene in scenes(6):
        np.testing.assert_array_equal(render(scene), render(scene))


@pytest.mark.parametrize("size", [16, 64, 100, 256])
def test_any_size_can_be_drawn(size):
    picture = render(scenes(1)[0], size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10


def test_a_large_drawing_shows_the_same_picture():
    # Not the pixel style's neighbours or thin lines, but what is where: coarse means agree.
    for scene in scenes(8):
        small, large = render(scene, 64), render(scene, 256)
        coarse = [p.reshape(8, s // 8, 8, s // 8, 3).mean((1, 3)) for p, s in ((small, 64), (large, 256))]
        assert np.abs(coarse[0] - coarse[1]).mean() < 8


def test_too_small_a_size_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        render(scenes(1)[0], 8)


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("object", OBJECTS), ("colour", COLOURS), ("ground", GROUNDS), ("sky", SKIES), ("style", STYLES)],
)
def test_every_value_of_an_attribute_looks_different(attribute, values):
    scene = scene_of(1, 3, None)
    pictures = [render(scene.with_(**{attribute: value})).astype(float) for value in values]
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(a - b).max() > 40


def test_an_extra_changes_the_picture_and_leaves_the_layout():
    for extra in EXTRAS:
        bare = scene_of(2, 5, None).with_(extras=(), style="photo")
        shown = bare.with_(extras=(extra,))
        changed = np.abs(render(bare).astype(int) - render(shown)).max(axis=2) > 24
        assert 10 < changed.sum() < 0.5 * changed.size
        assert shown.layout == bare.layout


def test_recolouring_changes_only_where_the_object_is():
    scene = scene_of(2, 9, None).with_(style="photo", extras=())
    other = "blue" if scene.colour != "blue" else "red"
    changed = np.abs(render(scene).astype(int) - render(scene.with_(colour=other))).max(axis=2) > 0
    ys, xs = np.nonzero(changed)
    half = 0.75 * scene.layout.object_size * 64 + 1
    assert len(xs) > 30
    assert np.abs(xs - scene.layout.object_x * 64).max() <= half
    assert ys.max() - ys.min() <= 1.15 * scene.layout.object_size * 64 + 1


def test_layout_depends_on_sky_object_colour_ground_and_style():
    base = scene_of(1, 0, None).with_(extras=(), object="boat", colour="red", ground="grass", sky="day", style="photo")

    def mean(field: str, **attributes: str) -> float:
        rng = np.random.default_rng(0)
        return float(np.mean([getattr(sample_layout(base.with_(**attributes), rng), field) for _ in range(400)]))

    assert mean("horizon", sky="night") - mean("horizon", sky="overcast") > 0.06  # more than one deviation of the noise
    assert mean("object_size", object="lighthouse") - mean("object_size", object="car") > 0.12
    assert mean("object_x", object="lighthouse") - mean("object_x", object="boat") > 0.2
    assert mean("object_x", colour="red") - mean("object_x", colour="blue") > 0.08
    assert mean("depth", ground="leaves") - mean("depth", ground="water") > 0.3
    assert mean("object_size", style="comic") - mean("object_size", style="pencil") > 0.04


def test_held_out_combinations_never_appear_in_training_and_each_part_of_them_does():
    held = [c for c in itertools.product(OBJECTS, COLOURS, STYLES) if is_held_out(*c)]
    assert 0.05 < len(held) / 480 < 0.15
    for scene in scenes(300, held_out=False):
        assert not is_held_out(scene.object, scene.colour, scene.style)
    for scene in scenes(60, held_out=True):
        assert is_held_out(scene.object, scene.colour, scene.style)
    trained = [c for c in itertools.product(OBJECTS, COLOURS, STYLES) if not is_held_out(*c)]
    assert {c[0] for c in trained} == set(OBJECTS)
    assert {(c[0], c[1]) for c in trained} == set(itertools.product(OBJECTS, COLOURS))


def test_cached_drawings_are_the_scenes_they_claim(tmp_path):
    first = cached_drawings(tmp_path, 12, seed=4)
    again = cached_drawings(tmp_path, 12, seed=4)
    for i in range(12):
        np.testing.assert_array_equal(first.pixels[i], render(first.scene(i)))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert len(list(tmp_path.iterdir())) == 1
