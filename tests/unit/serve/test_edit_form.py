"""A form's parts as values: every one checked, honoured or refused."""

from __future__ import annotations

import io
import typing

import numpy as np
import pytest
from PIL import Image

from ip2p.editing.edit_request import EditRequest
from serve.api_errors import ApiError
from serve.form import EditForm, edit_requests, known_fields, read_form
from serve.settings import Settings

LIMITS = Settings(default_steps=12, max_steps=50, max_n=4, max_prompt_chars=20, max_edit_pixels=64 * 64)


def picture(width: int = 16, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def form(**fields: str | bytes) -> EditForm:
    return read_form([("image", picture()), ("prompt", "add a moon"), *fields.items()], LIMITS)


def refused(**fields: str | bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        form(**fields)
    assert caught.value.status == 400
    return caught.value


def request(place: int = 0, seed: int = 5, **fields: str | bytes) -> EditRequest:
    return edit_requests(form(n=str(place + 1), **fields), LIMITS, seed)[place]


def test_what_is_left_out_is_the_servers_and_the_models_own() -> None:
    made = request()
    assert (made.steps, made.guidance_scale, made.image_guidance_scale, made.resolution) == (12, None, None, None)
    assert (made.sampler, made.negative_prompt, made.mask, made.deadline_s) == ("euler_ancestral", "", None, None)
    assert (made.batch, made.alone, made.previews, made.guidance_interval) == (False, False, 0, (0.0, 1.0))


def test_every_field_reaches_the_engine() -> None:
    made = request(
        num_inference_steps="7", guidance_scale="3.5", image_guidance_scale="1.25", guidance_start="0.25",
        guidance_end="0.75", negative_prompt="snow", sampler="dpmpp_2m", resolution="32", restore_size="true",
        priority="batch", deterministic="1", deadline_ms="1500", stream="true", partial_images="2", mask=picture(),
    )  # fmt: skip
    assert (made.instruction, made.negative_prompt, made.steps, made.sampler) == ("add a moon", "snow", 7, "dpmpp_2m")
    assert (made.guidance_scale, made.image_guidance_scale, made.guidance_interval) == (3.5, 1.25, (0.25, 0.75))
    assert (made.resolution, made.restore_size, made.batch, made.alone) == (32, True, True, True)
    assert (made.deadline_s, made.previews) == (1.5, 2)
    assert made.image.shape == (16, 16, 3)
    assert made.mask is not None
    assert (made.mask == 90).all()


def test_a_size_is_width_by_height() -> None:
    assert request(size="24x16").size == (24, 16)
    assert request(size="auto").size is None


def test_previews_without_a_stream_are_none() -> None:
    assert request(partial_images="0").previews == 0
    assert refused(partial_images="1").param == "partial_images"


def test_variants_take_the_seeds_that_follow_and_begin_again_after_the_last() -> None:
    assert [request(place, 2**32 - 2).seed for place in range(3)] == [2**32 - 2, 2**32 - 1, 0]


@pytest.mark.parametrize(
    ("text", "meant"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_flags_are_read_as_clients_write_them(text: str, meant: bool) -> None:
    assert form(stream=text).stream is meant


@pytest.mark.parametrize(
    ("written", "read"),
    [("  add a moon\n", "add a moon"), ("cafe\u0301", "café"), ("a\x00b", "a b"), ("🌙", "🌙"), ("a\ud800b", "a?b")],
)
def test_texts_are_composed_and_without_control_characters(written: str, read: str) -> None:
    parts: list[tuple[str, str | bytes]] = [("image", picture()), ("prompt", written)]
    assert read_form(parts, LIMITS).prompt == read


def test_a_text_is_measured_in_characters_once_it_is_composed() -> None:
    assert form(negative_prompt="e\u0301" * 20).negative_prompt == "é" * 20
    error = refused(negative_prompt="é" * 21)
    assert "at most 20 characters, got '21 characters'" in error.message


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"num_inference_steps": "51"}, "a whole number from 1 to 50, got '51'"), ({"n": "5"}, "from 1 to 4, got '5'"),
        ({"guidance_scale": "NaN"}, "a number from 0 to 100, got 'NaN'"), ({"size": "65x64"}, "at most 4096 pixels"),
        ({"resolution": "65"}, "from 8 to 64"), ({"sampler": "plms"}, "dpmpp_2m"), ({"stream": "si"}, "true or false"),
        ({"response_format": "url"}, "b64_json"), ({"markup": b"x"}, "not supported"), ({"user": b"x"}, "must be text"),
        ({"mask": "http://x/y.png"}, "must be a file"), ({"colour": "red"}, "colour is not known; known: image, mask"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_wanted(fields: dict[str, typing.Any], wanted: str) -> None:
    error = refused(**fields)
    assert wanted in error.message
    assert error.param == next(iter(fields))


def test_a_long_value_is_not_repeated_in_full() -> None:
    assert len(refused(seed="9" * 5000).message) < 200
    assert len(refused(size="9" * 5000).message) < 200


def test_image_may_be_named_as_a_list_of_one() -> None:
    assert read_form([("image[]", picture()), ("prompt", "add a moon")], LIMITS).image == picture()
    for names in (("image", "image"), ("image[]", "image[]"), ("image", "image[]")):
        with pytest.raises(ApiError) as caught:
            read_form([(name, picture()) for name in names], LIMITS)
        assert caught.value.code == "too_many_images"


def test_another_model_than_the_servers_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        form(model="dall-e-2")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_a_picture_is_named_by_its_field_where_it_is_refused() -> None:
    for name in ("image", "mask"):
        with pytest.raises(ApiError) as caught:
            edit_requests(read_form([*_base(name), (name, b"none")], LIMITS), LIMITS, 0)
        assert (caught.value.status, caught.value.param) == (415, name)


def _base(without: str) -> list[tuple[str, str | bytes]]:
    parts: list[tuple[str, str | bytes]] = [("prompt", "add a moon"), ("image", picture())]
    return [part for part in parts if part[0] != without]


def test_fields_that_are_known_are_those_that_are_read() -> None:
    assert set(known_fields()) >= {"image", "mask", "prompt", "seed", "quality", "guidance_end", "deadline_ms"}
    assert len(set(known_fields())) == len(known_fields())
