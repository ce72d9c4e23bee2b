"""What people and attackers send: every answer is a picture or an error of the one shape, and the server goes on."""

from __future__ import annotations

import json
import socket
import typing
from collections.abc import Callable, Iterator

import bad_pictures as bad
import numpy as np
import pytest
from PIL import Image, ImageCms
from serving import (
    EDITS,
    PICTURE,
    Command,
    Service,
    answer_on,
    error_in,
    far_apart,
    file_of,
    files_in,
    form_body,
    head_of,
    picture_in,
    pixels,
)  # fmt: skip

pytestmark = pytest.mark.service


@pytest.fixture
def unharmed(service: Service) -> Iterator[None]:
    """After the test the server edits as before, and has failed nowhere."""
    failures = service.metric("ip2p_requests_total", status="500")
    yield
    assert picture_in(service.edit()).shape == (16, 16, 3)
    assert service.metric("ip2p_requests_total", status="500") == failures


# ---- pictures that are none


REFUSED: dict[str, tuple[int, Callable[[], bytes]]] = {
    "empty": (400, lambda: b""),
    "text": (415, lambda: b"not a picture at all"),
    "html": (415, lambda: b"<!doctype html><script>alert(1)</script>"),
    "svg": (415, lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "eps": (415, bad.eps),
    "psd": (415, bad.psd),
    "tiff": (415, lambda: file_of(pixels(), "TIFF")),
    "gif": (415, lambda: bad.animation("GIF")),
    "animated webp": (415, lambda: bad.animation("WEBP")),
    "animated png": (415, lambda: bad.animation("PNG")),
    "jpeg cut in half": (400, lambda: bad.PHOTO[: len(bad.PHOTO) // 2]),
    "jpeg without a picture": (400, lambda: b"\xff\xd8\xff\xd9"),
    "png cut in half": (400, lambda: PICTURE[: len(PICTURE) // 2]),
    "png of its signature": (400, lambda: bad.SIGNATURE),
    "webp without a picture": (400, lambda: b"RIFF\x04\x00\x00\x00WEBP"),
    "png with flipped bits": (400, bad.flipped_bits),
    "header of 20000 x 20000": (413, bad.header_bomb),
    "120 million pixels": (413, bad.large_photo),
    "9000 x 9000": (413, bad.small_file_of_many_pixels),
    "text bomb": (400, bad.text_bomb),
    "no width": (400, lambda: bad.png_of(0, 16, b"")),
    "1 x 1": (400, lambda: file_of(pixels(0, 1, 1))),
    "1 x 5000": (400, lambda: file_of(pixels(0, 1, 5000))),
    "8 x 65": (400, lambda: file_of(pixels(0, 8, 65))),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_usable_picture_is_refused_by_the_name_of_its_field(service: Service, name: str) -> None:
    status, make = REFUSED[name]
    error = error_in(service.edit(make()), status)
    assert error["param"] == "image"
    assert error["code"] in ("invalid_image", "unsupported_image", "image_too_large", "invalid_value")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", ["empty", "text", "png cut in half", "header of 20000 x 20000", "animated png"])
def test_masks_are_looked_at_as_closely(service: Service, name: str) -> None:
    status, make = REFUSED[name]
    assert error_in(service.edit(mask=make()), status)["param"] == "mask"


@pytest.mark.usefixtures("unharmed")
def test_a_mask_of_another_size_is_refused_by_the_name_of_its_field(service: Service) -> None:
    error = error_in(service.edit(mask=file_of(pixels(0, 12, 16))), 400)
    assert (error["param"], error["code"]) == ("mask", "invalid_value")


@pytest.mark.parametrize("make", [bad.header_bomb, bad.large_photo, bad.small_file_of_many_pixels, bad.text_bomb])
def test_pictures_made_to_fill_the_memory_do_not(command: Command, make: Callable[[], bytes]) -> None:
    command.edit()
    data = make()
    assert len(data) < 2 * 2**20
    assert command.peak_growth(lambda: error_in(command.edit(data))) < 50 * 2**20
    assert command.edit().status_code == 200


def test_many_variants_hold_the_picture_once(command: Command) -> None:
    large = file_of(np.zeros((2500, 2500, 3), np.uint8))  # 19 MB once decoded
    one = command.peak_growth(lambda: files_in(command.edit(large, num_inference_steps=1)))
    eight = command.peak_growth(lambda: files_in(command.edit(large, num_inference_steps=1, n=8)))
    assert eight < one + 60 * 2**20


# ---- pictures that are odd and good


def seen(service: Service, file: bytes, width: int = 16, height: int = 16) -> np.ndarray:
    """The picture as the server understood it: of an edit that a mask keeps from changing anything."""
    kept = file_of(np.zeros((height, width), np.uint8))
    return picture_in(service.edit(file, mask=kept, restore_size=True, num_inference_steps=1))


def test_a_wrong_name_does_not_matter(service: Service) -> None:
    answer = service.ask(
        "POST", EDITS, data={"prompt": "make it night", "num_inference_steps": 1},
        files={"image": ("invoice.pdf", PICTURE, "application/pdf")},
    )  # fmt: skip
    assert files_in(answer)


def test_a_photo_that_a_camera_turned_is_upright(service: Service) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file_of(pixels(1, 24, 16), exif=exif)
    assert np.array_equal(seen(service, turned, 16, 24), np.rot90(pixels(1, 24, 16), -1))


def test_colours_for_print_are_understood(service: Service) -> None:
    red = file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert far_apart(seen(service, red), np.full((16, 16, 3), (255, 0, 0), np.uint8)) < 10


def test_sixteen_bit_greys_keep_their_brightness(service: Service) -> None:
    assert abs(float(seen(service, bad.sixteen_bits()).mean()) - 40000 / 257) <= 2


def test_what_is_transparent_is_seen_on_white(service: Service) -> None:
    hidden = np.dstack([np.full((16, 16, 3), (255, 0, 0), np.uint8), np.zeros((16, 16), np.uint8)])
    assert (seen(service, file_of(hidden)) == 255).all()


def test_a_palette_with_a_transparent_colour_is_seen_on_white(service: Service) -> None:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 200, 30, 30])
    assert (seen(service, file_of(picture, transparency=1)) == 255).all()


def test_colours_are_what_their_profile_means(service: Service) -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert seen(service, file_of(red, icc_profile=bad.swapped_profile()))[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    "profile", [b"no profile", bad.swapped_profile()[:200], ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))]
)
def test_a_profile_that_cannot_be_used_is_left_out(service: Service, profile) -> None:
    data = profile if isinstance(profile, bytes) else profile.tobytes()
    assert np.array_equal(seen(service, file_of(pixels(5), icc_profile=data)), pixels(5))


def test_a_photo_with_a_companion_as_phones_write_it_is_a_photo(service: Service) -> None:
    assert far_apart(seen(service, bad.in_phones_format(), 64, 48), seen(service, bad.PHOTO, 64, 48)) <= 2


def test_what_hangs_behind_a_picture_is_not_in_the_result(service: Service) -> None:
    answer = service.edit(bad.PHOTO + b"<script>alert(1)</script>", output_format="jpeg")
    (file,) = files_in(answer)
    assert b"<script>" not in file
    assert answer.headers["x-content-type-options"] == "nosniff"


# ---- values


def sent(service: Service, body: bytes) -> tuple[int, dict[str, typing.Any]]:
    """Status and error of a form that is sent byte by byte."""
    status, said = answer_on(service.connected(EDITS, head_of(body), body))
    return status, json.loads(said)["error"]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("missing", ["image", "prompt"])
def test_what_must_be_there_is_asked_for(service: Service, missing: str) -> None:
    parts: list[tuple[str, bytes | str]] = [("prompt", "make it night"), ("image", PICTURE)]
    status, error = sent(service, form_body(*[part for part in parts if part[0] != missing]))
    assert (status, error["code"], error["param"]) == (400, "missing_parameter", missing)


BAD_VALUES: list[tuple[str, str]] = [
    ("prompt", ""), ("prompt", "  \n\t "), ("prompt", "\x00\x01\x7f"), ("prompt", "x" * 1001),
    ("prompt", "x" * 100_000), ("negative_prompt", "x" * 1001), ("user", "x" * 5000),
    *[("num_inference_steps", value) for value in ("0", "-1", "1000000000", "1.5", "ten", "", "1e2", "0x10", "٣")],
    *[("guidance_scale", value) for value in ("NaN", "Infinity", "-Infinity", "-0.1", "101", "seven", "", "1e400")],
    *[("image_guidance_scale", value) for value in ("nan", "inf", "-1", '"7"')],
    *[("size", value) for value in ("513x513", "100000x100000", "0x16", "16", "16x", "-16x16", "16X16", "1x1", "")],
    *[("seed", value) for value in (str(2**64), str(2**32), "-1", "1.0", "9" * 400, "")],
    *[("n", value) for value in ("0", "9", "-1", "two")],
    *[("resolution", value) for value in ("0", "7", "65", "100000", "-16")],
    *[("guidance_start", value) for value in ("-0.1", "1.1", "nan")], ("guidance_end", "2"),
    *[("sampler", value) for value in ("plms", "", "EULER_ANCESTRAL")], ("priority", "first"),
    *[("restore_size", value) for value in ("yes", "", "2")], ("deterministic", "maybe"), ("stream", "on"),
    *[("deadline_ms", value) for value in ("0", "-5", "600001", "soon")], ("output_format", "gif"),
    ("partial_images", "4"), ("partial_images", "-1"), ("background", "transparent"), ("quality", "ultra"),
    ("response_format", "url"),
]  # fmt: skip


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=lambda one: repr(one)[:24])
def test_a_bad_value_is_refused_by_the_name_of_its_field(service: Service, field: str, value: str) -> None:
    error = error_in(service.edit(**{field: value}), 400)
    assert (error["param"], error["code"], error["type"]) == (field, "invalid_value", "invalid_request_error")
    assert len(error["message"]) < 300


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "n": 2}, "n"), ({"partial_images": 1}, "partial_images"),
        ({"output_compression": 50}, "output_compression"), ({"size": "16x16", "restore_size": True}, "size"),
        ({"size": "16x16", "resolution": 16}, "size"), ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_refused(service: Service, fields, param: str) -> None:
    assert error_in(service.edit(**fields), 400)["param"] == param


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "name", ["steps", "Prompt", "image_url", "prompt ", "ünïcode", "a" * 3000, "n[0]", "__proto__"]
)
def test_fields_that_nobody_knows_are_refused_by_name(service: Service, name: str) -> None:
    error = error_in(service.edit(**{name: "1"}), 400)
    assert (error["param"], error["code"]) == (name, "unknown_parameter")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", ["prompt", "seed", "image"])
def test_a_field_that_comes_twice_is_refused(service: Service, name: str) -> None:
    value: bytes | str = PICTURE if name == "image" else "7"
    body = form_body((name, value), (name, value))
    status, error = sent(service, body)
    assert (status, error["param"]) == (400, name)


@pytest.mark.usefixtures("unharmed")
def test_a_file_where_text_belongs_and_text_where_a_file_belongs_are_refused(service: Service) -> None:
    for parts, param in (([("prompt", b"as a file"), ("image", PICTURE)], "prompt"), ([("image", "as text")], "image")):
        status, error = sent(service, form_body(*parts))
        assert (status, error["param"]) == (400, param)


def test_a_text_longer_than_the_encoder_reads_is_edited_and_said_to_be_cut(service: Service) -> None:
    answer = service.edit(prompt="castle " * 100)
    assert files_in(answer)
    assert answer.json()["ip2p"]["truncated"] is True
    assert service.edit().json()["ip2p"]["truncated"] is False


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "text", ["🌙🏰👩‍👩‍👧", "اجعلها ليلا", "night\x00night", "a\u202eb", "\ufffe\uffff", "e\u0301" * 400]
)
def test_any_text_is_an_instruction(service: Service, text: str) -> None:
    assert files_in(service.edit(prompt=text))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("written", [b"\xed\xa0\x80 night", b"\xff\xfe night", b"night \xc3"])
def test_bytes_that_are_no_text_are_no_failure(service: Service, written: bytes) -> None:
    body = form_body(("prompt", "THERE"), ("num_inference_steps", "1"), ("image", PICTURE)).replace(b"THERE", written)
    status, _ = answer_on(service.connected(EDITS, head_of(body), body))
    assert status in (200, 400)


def test_text_that_is_slow_to_compose_holds_nobody_up(service: Service) -> None:
    slow = "a" + "\u0300" * 20_000 + "\u0316" * 20_000  # each mark of the second kind belongs before all of the first
    answer = service.edit(prompt=slow)
    assert error_in(answer, 400)["param"] == "prompt"
    assert answer.elapsed.total_seconds() < 0.5


@pytest.mark.parametrize("place", ["http://127.0.0.1:{}/x.png", "http://localhost:{}/", "file:///etc/passwd"])
@pytest.mark.parametrize("field", ["image_url", "image", "image[]", "mask"])
def test_addresses_are_not_fetched(service: Service, field: str, place: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.05)
        body = form_body((field, place.format(trap.getsockname()[1])), ("prompt", "make it night"))
        status, error = sent(service, body)
        assert (status, error["param"]) == (400, field)
        with pytest.raises(TimeoutError):
            trap.accept()


# ---- bodies


BODY = form_body(("prompt", "make it night"), ("num_inference_steps", "1"), ("image", PICTURE))
ODD_BODIES: dict[str, tuple[int, str, bytes]] = {
    "json": (415, "application/json", b'{"prompt": "make it night"}'),
    "broken json": (415, "application/json", b"{"),
    "no type": (415, "", BODY),
    "url-encoded": (415, "application/x-www-form-urlencoded", b"prompt=night"),
    "no boundary": (400, "multipart/form-data", BODY),
    "another boundary": (400, "multipart/form-data; boundary=c", BODY),
    "no form": (400, "multipart/form-data; boundary=b", b"garbage"),
    "nothing": (400, "multipart/form-data; boundary=b", b""),
    "a part without a name": (400, "multipart/form-data; boundary=b", BODY.replace(b' name="prompt"', b"")),
    "a part without a head": (400, "multipart/form-data; boundary=b", b"--b\r\n\r\nhi\r\n--b--\r\n"),
    "a form without an end": (400, "multipart/form-data; boundary=b", BODY[:40]),
    "parts without end": (400, "multipart/form-data; boundary=b", form_body(*[(f"f{n}", "") for n in range(100)])),
    "files without end": (400, "multipart/form-data; boundary=b", form_body(*[(f"f{n}", b"") for n in range(100)])),
    "a long text": (400, "multipart/form-data; boundary=b", form_body(("prompt", "x" * 300_000))),
    "a long head": (400, "multipart/form-data; boundary=b", form_body(("x" * 200_000, "1"))),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", list(ODD_BODIES))
def test_a_body_that_is_no_form_is_refused(service: Service, name: str) -> None:
    status, kind, body = ODD_BODIES[name]
    answer = service.ask("POST", EDITS, {"content-type": kind}, data=body)
    error_in(answer, status)


def test_the_name_of_the_form_is_read_in_any_case(service: Service) -> None:
    assert files_in(service.ask("POST", EDITS, {"content-type": "Multipart/Form-Data; boundary=b"}, data=BODY))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("charset", "name"),
    [("undefined", "prompt"), ("unicode_escape", "\\ud800"), ("utf-7", "+2AA-"), ("idna", "prompt"), ("rot13", "n")],
)
def test_a_charset_of_the_senders_choice_is_no_failure(service: Service, charset: str, name: str) -> None:
    body = form_body((name, "hi"), ("image", PICTURE))
    answer = service.ask(
        "POST", EDITS, {"content-type": f"multipart/form-data; charset={charset}; boundary=b"}, data=body
    )
    assert answer.status_code in (200, 400, 415)


# ---- paths and headers


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "path", ["/nothing", "/%00", "/%ff", "/" + "a" * 3000, "/..%2f..%2fetc%2fpasswd", "/v1/edits/x", "/v1/edits/%00",
             "/v1/edits/%F0%9F%98%80/content", "/v1/models/x", "/index.html/x"],
)  # fmt: skip
def test_what_is_not_there_is_not_found(service: Service, path: str) -> None:
    error_in(service.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", EDITS), ("PUT", EDITS), ("DELETE", "/v1/models"), ("POST", "/metrics"), ("GET", "/v1/edits/x/cancel")],
)
def test_a_method_that_a_route_lacks_is_said_to_be_lacking(service: Service, method: str, path: str) -> None:
    assert error_in(service.ask(method, path), 405)["code"] == "method_not_allowed"


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("sent", ["", "two words", "x" * 65, 'a"b', "ä"])
def test_a_request_id_that_is_no_plain_word_is_replaced(service: Service, sent: str) -> None:
    answer = service.get("/v1/models", {"x-request-id": sent.encode("latin-1")})  # type: ignore[dict-item]
    assert answer.headers["x-request-id"] not in ("", sent)
