"""Every kind of picture that people have, upright and in RGB."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ip2p.errors import PictureError, StorageError
from ip2p.pictures import decode_mask, decode_picture, read_picture, upright_rgb


def encoded(picture: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def halves() -> np.ndarray:
    """Red on the left, blue on the right; 12 x 8 pixels."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :6, 0], pixels[:, 6:, 2] = 255, 255
    return pixels


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_lossless_pictures_come_back_as_they_were(image_format):
    assert np.array_equal(decode_picture(encoded(Image.fromarray(halves()), image_format, lossless=True)), halves())


def test_rotation_noted_by_a_camera_is_done():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    decoded = decode_picture(encoded(Image.fromarray(halves()), exif=exif))
    assert decoded.shape == (12, 8, 3)
    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decoded[-1, 0].tolist() == [0, 0, 255]


def test_transparent_pictures_are_seen_on_white():
    pixels = np.dstack([halves(), np.full((8, 12), 255, np.uint8)])
    pixels[:, :6, 3] = 0  # hidden red
    pixels[:, 6:, 3] = 51  # a fifth of the blue
    decoded = decode_picture(encoded(Image.fromarray(pixels)))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 11].tolist() == [204, 204, 255]


def test_palette_with_a_transparent_colour_is_seen_on_white():
    picture = Image.fromarray(halves()).quantize(4)
    hidden = picture.getpixel((0, 0))
    decoded = decode_picture(encoded(picture, transparency=hidden))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 11].tolist() == [0, 0, 255]


def test_sixteen_bit_greys_keep_their_whole_range():
    greys = np.array([[0, 257, 32768, 40000, 65535]] * 8, np.uint16).repeat(2, axis=1)
    decoded = decode_picture(encoded(Image.fromarray(greys)))
    assert decoded[0, ::2].tolist() == [[v, v, v] for v in (0, 1, 128, 156, 255)]


@pytest.mark.parametrize(("mode", "value", "expected"), [("L", 77, 77), ("LA", (77, 255), 77), ("1", 1, 255)])
def test_greys_become_rgb(mode, value, expected):
    decoded = decode_picture(encoded(Image.new(mode, (9, 8), value)))
    assert decoded.shape == (8, 9, 3)
    assert (decoded == expected).all()


def test_cmyk_becomes_rgb():
    decoded = decode_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 8


def test_floats_are_refused():
    with pytest.raises(PictureError, match="no fixed range"):
        upright_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused_by_name(image_format):
    with pytest.raises(PictureError, match="holiday: found another format, expected a PNG, JPEG, WEBP") as refused:
        decode_picture(encoded(Image.fromarray(halves()), image_format), "holiday")
    assert refused.value.kind == "format"


@pytest.mark.parametrize(("data", "found"), [(b"", "an empty file"), (b"<svg/>", "another format")])
def test_what_is_no_picture_at_all_is_refused_by_name(data, found):
    with pytest.raises(PictureError, match=f"holiday: found {found}"):
        decode_picture(data, "holiday")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_are_refused_by_name(image_format):
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), image_format)
    with pytest.raises(PictureError, match="holiday: not a whole") as refused:
        decode_picture(whole[: len(whole) // 2], "holiday")
    assert refused.value.kind == "damaged"


def test_animations_are_refused():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="animation of 2 frames"):
        decode_picture(data)


def test_pictures_too_small_to_edit_are_refused():
    with pytest.raises(PictureError, match="found 7 x 9 pixels, expected at least 8 a side"):
        decode_picture(encoded(Image.new("RGB", (7, 9))))


def test_colours_are_what_the_profile_means():
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))  # a profile of another mode: colours as they are
    grey = Image.new("RGB", (8, 8), (100, 150, 200))
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (same, b"no profile at all", linear.tobytes()):
        assert decode_picture(encoded(grey, icc_profile=profile))[0, 0].tolist() == [100, 150, 200]


def test_a_profile_that_swaps_primaries_swaps_them():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(profile)  # the red and the blue column of the matrix, exchanged in the table of tags
    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    decoded = decode_picture(encoded(Image.new("RGB", (8, 8), (255, 0, 0)), icc_profile=bytes(swapped)))
    assert decoded[0, 0].tolist() == [0, 0, 255]


def test_size_is_checked_before_pixels_are_decoded():
    small = encoded(Image.fromarray(halves()))
    assert decode_picture(small, max_pixels=96).shape == (8, 12, 3)
    header_only = small[: small.index(b"IDAT") + 4]  # nothing left to decode
    with pytest.raises(PictureError, match="found 12 x 8 pixels, expected at most 95") as refused:
        decode_picture(header_only, max_pixels=95)
    assert refused.value.kind == "size"


def test_a_header_of_a_bomb_counts_as_too_large():
    small = bytearray(encoded(Image.fromarray(halves())))
    small[16:24] = struct.pack(">II", 20000, 20000)
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    with pytest.raises(PictureError) as refused:
        decode_picture(bytes(small))
    assert refused.value.kind == "size"


def test_masks_say_by_white_or_by_transparency_where_to_edit():
    white_left = np.zeros((8, 12), np.uint8)
    white_left[:, :6] = 255
    assert np.array_equal(decode_mask(encoded(Image.fromarray(white_left))), white_left)
    clear_left = np.dstack([halves(), 255 - white_left])
    assert np.array_equal(decode_mask(encoded(Image.fromarray(clear_left))), white_left)
    with pytest.raises(PictureError, match="mask: found an empty file"):
        decode_mask(b"")


def test_files_are_read_and_absent_ones_named(tmp_path: Path):
    (tmp_path / "in.png").write_bytes(encoded(Image.fromarray(halves())))
    assert np.array_equal(read_picture(tmp_path / "in.png"), halves())
    with pytest.raises(StorageError, match=r"nowhere\.png: no such file"):
        read_picture(tmp_path / "nowhere.png")
