"""Picture files that are damaged, odd, or made to do harm, built byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms
from serving import PICTURE, file_of, pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PHOTO = file_of(pixels(5, 64, 48), "JPEG")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, data: bytes, colour: int = 0, depth: int = 8, before: bytes = b"") -> bytes:
    """A PNG whose header says ``width`` x ``height`` whatever ``data``, its compressed rows, holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """``count`` zero bytes, compressed without holding them."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    packed = [packer.compress(block[: min(len(block), count - at)]) for at in range(0, count, len(block))]
    return b"".join([*packed, packer.flush()])


def header_bomb() -> bytes:
    return png_of(20000, 20000, b"")


def large_photo() -> bytes:
    """120 million pixels of one bit each."""
    return png_of(12000, 10000, zeros(10000 * (1 + 12000 // 8)), depth=1)


def small_file_of_many_pixels() -> bytes:
    """81 million pixels, 243 MB once decoded."""
    return png_of(9000, 9000, zeros(9000 * (1 + 3 * 9000)), colour=2)


def text_bomb() -> bytes:
    """A good picture with 70 MB of text in a few kilobytes."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels())
    return png_of(16, 16, zlib.compress(rows), colour=2, before=chunk(b"zTXt", b"Comment\0\0" + zeros(70 * 2**20)))


def flipped_bits() -> bytes:
    """A PNG whose compressed rows are damaged and whose checksum says that they are not."""
    at = PICTURE.index(b"IDAT")
    length = struct.unpack(">I", PICTURE[at - 4 : at])[0]
    data = bytearray(PICTURE[at + 4 : at + 4 + length])
    data[len(data) // 2] ^= 0xFF
    return png_of(16, 16, bytes(data), colour=2)


def animation(image_format: str) -> bytes:
    frames = [Image.fromarray(pixels(number)) for number in range(3)]
    return file_of(frames[0], image_format, save_all=True, append_images=frames[1:])


def eps() -> bytes:
    return file_of(pixels(), "EPS")


def psd() -> bytes:
    """A Photoshop file of one 8 x 8 picture."""
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + bytes(12) + struct.pack(">H", 0) + bytes(3 * 64)


def in_phones_format() -> bytes:
    """The photo and its small companion in one JPEG, as phones and cameras write it (Multi-Picture Format)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(5, 64, 48)).save(
        buffer, "MPO", save_all=True, append_images=[Image.fromarray(pixels(5, 32, 24))]
    )
    return buffer.getvalue()


def with_profile(profile: bytes) -> bytes:
    return file_of(pixels(5, 64, 48), "PNG", icc_profile=profile)


def swapped_profile() -> bytes:
    """A profile whose red is blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def sixteen_bits() -> bytes:
    return file_of(np.full((16, 16), 40000, np.uint16))
