"""The original's size rule without its float bug, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ip2p.editing.resize import crop_to, pad_to, restore, working_size
from ip2p.errors import InputError


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    """A picture that survives a change of size."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1920, 1080), (512, 320)), ((513, 512), (512, 512)), ((3000, 1000), (576, 192)), ((2048, 271), (960, 128)),
        ((354, 306), (512, 448)),  # the released code's floats make it 512 x 384
        ((512, 512), (512, 512)), ((64, 64), (512, 512)), ((1, 1), (512, 512)),
    ],
)  # fmt: skip
def test_golden_sizes_of_the_64_pixel_rule_also_stand_upright(size, expected):
    assert working_size(*size) == expected
    assert working_size(*size[::-1]) == expected[::-1]


@pytest.mark.parametrize(("size", "expected"), [((640, 360), (64, 40)), ((64, 64), (64, 64)), ((100, 99), (64, 64))])
def test_multiple_and_resolution_are_parameters(size, expected):
    assert working_size(*size, resolution=64, multiple=8) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([8, 16, 64]), st.integers(64, 1024))
def test_sides_are_multiples_and_the_short_one_is_the_next_above_its_share(width, height, multiple, resolution):
    short, long = sorted((width, height))
    if long > 8 * short:
        with pytest.raises(InputError, match="8 to 1"):
            working_size(width, height, resolution, multiple)
        return
    found = working_size(width, height, resolution, multiple)
    assert all(side % multiple == 0 and side >= multiple for side in found)
    assert (found[0] >= found[1]) if width > height else (found[0] <= found[1])
    share = short * resolution
    assert min(found) * long >= share > (min(found) - multiple) * long
    assert max(found) * short <= min(found) * long < (max(found) + multiple) * short


@pytest.mark.parametrize(("size", "problem"), [((1000, 10), "8 to 1"), ((0, 5), "8 to 1"), ((5, 0), "8 to 1")])
def test_pictures_without_a_useful_shape_are_refused(size, problem):
    with pytest.raises(InputError, match=problem):
        working_size(*size)


def test_resolution_below_one_multiple_is_refused():
    with pytest.raises(InputError, match="resolution 63 is too small, this model needs at least 64"):
        working_size(10, 10, 63)


@pytest.mark.parametrize(("size", "target"), [((192, 108), (64, 40)), ((54, 96), (40, 64)), ((64, 64), (64, 64))])
def test_crop_is_that_of_the_original(size, target):
    picture = noise(*size)
    expected = ImageOps.fit(Image.fromarray(picture), target, method=Image.Resampling.LANCZOS)
    assert np.array_equal(crop_to(picture, target).pixels, np.asarray(expected))


def test_restored_crop_changes_only_what_the_edit_saw():
    picture = noise(192, 108)  # as wide as 64 x 36: at 64 x 40 both ends are cut off
    fitted = crop_to(picture, (64, 40))
    assert fitted.seen == (10, 0, 182, 108)
    restored = restore(np.zeros_like(fitted.pixels), fitted)
    assert not restored[:, 10:182].any()
    assert np.array_equal(restored[:, :10], picture[:, :10])
    assert np.array_equal(restored[:, 182:], picture[:, 182:])


@pytest.mark.parametrize("size", [(192, 108), (108, 192), (50, 50), (33, 47)])
@pytest.mark.parametrize("fit", [crop_to, pad_to])
def test_restoring_an_unchanged_picture_gives_it_back_at_its_size(size, fit):
    picture = smooth(*size)
    fitted = fit(picture, working_size(*size, 64, 8))
    restored = restore(fitted.pixels, fitted)
    assert restored.shape == picture.shape
    assert np.abs(restored.astype(int) - picture).mean() < 2
    assert np.abs(restored.astype(int) - picture).max() < 16


def test_padding_cuts_nothing_off_keeps_the_aspect_and_repeats_the_border():
    picture = smooth(192, 108)
    fitted = pad_to(picture, (64, 40))
    assert fitted.inside == (0, 2, 64, 38)
    assert fitted.seen == (0, 0, 192, 108)
    assert fitted.pixels.shape == (40, 64, 3)
    assert np.array_equal(fitted.pixels[0], fitted.pixels[2])
    assert np.array_equal(fitted.pixels[39], fitted.pixels[37])


def test_restoring_ignores_the_padding():
    fitted = pad_to(smooth(192, 108), (64, 40))
    edited = fitted.pixels.copy()
    edited[:2], edited[38:] = 0, 0
    assert np.array_equal(restore(edited, fitted), restore(fitted.pixels, fitted))


def test_restoring_another_size_is_refused():
    fitted = pad_to(smooth(20, 20), (16, 16))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\), expected \(16, 16, 3\)"):
        restore(np.zeros((8, 8, 3), np.uint8), fitted)
