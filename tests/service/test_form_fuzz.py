"""Any form at all is an edit or an error of the one shape."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import bad_pictures as bad
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from serving import EDITS, PICTURE, Service, error_in, file_of, form_body, pixels, serving

pytestmark = pytest.mark.service

KNOWN = [
    "prompt", "model", "n", "size", "output_format", "output_compression", "stream", "partial_images", "user",
    "safety_identifier", "num_inference_steps", "guidance_scale", "image_guidance_scale", "guidance_start",
    "guidance_end", "seed", "negative_prompt", "sampler", "resolution", "restore_size", "priority", "deterministic",
    "deadline_ms", "background", "quality", "response_format", "image", "image[]", "mask", "markup",
]  # fmt: skip
GOOD: dict[str, list[str]] = {
    "n": ["1", "2"], "size": ["16x16", "8x24", "auto", "4x4"], "output_format": ["png", "webp", "jpeg"],
    "output_compression": ["0", "100"], "stream": ["true", "false"], "partial_images": ["0", "2"],
    "num_inference_steps": ["1", "2", "4"], "guidance_scale": ["0", "1", "7.5", "100"], "guidance_start": ["0", "0.5"],
    "guidance_end": ["0", "0.5", "1"], "seed": ["0", "4294967295"], "sampler": ["euler_ancestral", "dpmpp_2m"],
    "resolution": ["8", "13", "24"], "restore_size": ["true", "0"], "priority": ["batch"], "deterministic": ["1"],
    "deadline_ms": ["1", "600000"], "quality": ["auto"], "image_guidance_scale": ["0", "1", "100"],
}  # fmt: skip
FILES = [PICTURE, file_of(pixels(1, 31, 9)), bad.PHOTO, bad.flipped_bits(), b"", b"x", bad.header_bomb(), PICTURE[:60]]
ODD = ["", "-1", "1e3", "nan", "inf", "9" * 30, "\x00", "true", "null", "٣", "\ud83d", "0.5", "16x", "a" * 2000]

texts = some.one_of(some.sampled_from(ODD), some.text(max_size=12))
values = some.one_of(texts, some.sampled_from(FILES))
good = some.sampled_from(list(GOOD)).flatmap(lambda name: some.tuples(some.just(name), some.sampled_from(GOOD[name])))
part = some.one_of(
    good, good, good, some.tuples(some.sampled_from(KNOWN), values), some.tuples(some.text(max_size=6), values)
)


@pytest.fixture(scope="module")
def fuzzed(edit_folder: Path) -> Iterator[Service]:
    with serving(edit_folder, max_steps=5, max_edit_pixels=32 * 32) as made:
        yield made


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=some.lists(part, max_size=6), whole=some.booleans())
def test_any_form_is_an_edit_or_an_error(fuzzed: Service, parts: list[tuple[str, str | bytes]], whole: bool) -> None:
    base: list[tuple[str, str | bytes]] = [("image", PICTURE), ("prompt", "night"), ("num_inference_steps", "2")]
    names = {name for name, _ in parts}
    written = _body([*(one for one in base if whole and one[0] not in names), *parts])
    answer = fuzzed.ask("POST", EDITS, {"content-type": "multipart/form-data; boundary=b"}, data=written)
    if answer.status_code == 504:
        assert error_in(answer)["code"] == "deadline_exceeded"
    elif answer.status_code != 200:
        assert answer.status_code in (400, 404, 413, 415), answer.text
        error_in(answer)


def _body(parts: list[tuple[str, str | bytes]]) -> bytes:
    return form_body(*[(_sendable(name), _sendable(value)) for name, value in parts])


def _sendable(value: typing.Any) -> typing.Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


@settings(max_examples=40, derandomize=True, deadline=None)
@given(body=some.binary(max_size=300), kind=some.sampled_from(["multipart/form-data; boundary=b", "text/plain", ";;="]))
def test_any_bytes_are_an_error(fuzzed: Service, body: bytes, kind: str) -> None:
    assert fuzzed.ask("POST", EDITS, {"content-type": kind}, data=b"--b\r\n" + body).status_code in (400, 415)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(head=some.text(some.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40))
def test_any_header_of_a_part_is_no_failure(fuzzed: Service, head: str) -> None:
    body = b"--b\r\ncontent-disposition: form-data; " + head.encode("latin-1") + b"\r\n\r\nhi\r\n--b--\r\n"
    answer = fuzzed.ask("POST", EDITS, {"content-type": "multipart/form-data; boundary=b"}, data=body)
    error_in(answer, 400)
