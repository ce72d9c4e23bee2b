"""The official client, unchanged: what it sends is understood, what it gets back is of its own classes."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent, ImagesResponse
from serving import ASKED, PICTURE, FixedCost, Service, Steps, busy, far_apart, picture_in, serving, until

from ip2p.images import decode_image

pytestmark = pytest.mark.service
KEY = "a-key-for-the-client"
EXTRA = {"num_inference_steps": 3, "seed": 1}


def client_of(service: Service, **options) -> OpenAI:
    return OpenAI(**{"base_url": f"{service.url}/v1", "api_key": service.key or "any", "max_retries": 0, **options})


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with client_of(service) as made:
        yield made


def decoded(text: str | None) -> np.ndarray:
    return decode_image(base64.b64decode(text or ""))


def test_an_edit_is_the_one_that_a_plain_form_gives(service: Service, client: OpenAI) -> None:
    answer = client.images.edit(image=PICTURE, prompt="make it night", extra_body=EXTRA)
    assert isinstance(answer, ImagesResponse)
    assert answer.data
    assert len(answer.data) == 1
    assert far_apart(decoded(answer.data[0].b64_json), picture_in(service.edit())) <= 1


def test_a_file_of_any_name_is_taken(client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_bytes(PICTURE)
    answer = client.images.edit(image=tmp_path / "holiday.txt", prompt="make it night", extra_body=EXTRA)
    assert answer.size == "16x16"


def test_a_list_of_one_picture_is_one_picture(service: Service, client: OpenAI) -> None:
    answer = client.images.edit(image=[PICTURE], prompt="make it night", extra_body=EXTRA)
    assert answer.data
    assert far_apart(decoded(answer.data[0].b64_json), picture_in(service.edit())) <= 1


def test_a_list_of_two_pictures_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=[PICTURE, PICTURE], prompt="make it night")
    assert (refused.value.code, refused.value.param) == ("too_many_images", "image")


def test_the_answer_says_what_openai_says_and_what_repeats_the_edit(client: OpenAI) -> None:
    extra = {**EXTRA, "guidance_scale": 3.5, "image_guidance_scale": 1.25, "sampler": "dpmpp_2m"}
    answer = client.images.edit(image=PICTURE, prompt="make it night", n=2, output_format="webp", extra_body=extra)
    assert (answer.size, answer.output_format, answer.background) == ("16x16", "webp", "opaque")
    assert answer.created == pytest.approx(time.time(), abs=60)
    assert answer.usage
    assert answer.usage.output_tokens == answer.usage.total_tokens == 2 * 3 * 3  # variants, steps, rows
    details = (answer.model_extra or {})["ip2p"]
    said = {name: details[name] for name in ("steps", "seeds", "guidance_scale", "image_guidance_scale", "sampler")}
    assert said == {
        "steps": 3, "seeds": [1, 2], "guidance_scale": 3.5, "image_guidance_scale": 1.25, "sampler": "dpmpp_2m",
    }  # fmt: skip
    assert details["truncated"] is False
    assert details["row_evals"] == 18
    assert 0 <= details["queue_ms"] <= details["edit_ms"]


def test_flags_and_masks_go_through_the_client(client: OpenAI) -> None:
    answer = client.images.edit(
        image=PICTURE, mask=PICTURE, prompt="make it night", background="auto", quality="auto",
        response_format="b64_json", user="someone", size="20x12", output_format="jpeg", output_compression=80,
        extra_body={**EXTRA, "deterministic": True, "priority": "batch", "negative_prompt": "snow"},
    )  # fmt: skip
    assert answer.size == "20x12"


def test_every_answer_has_a_request_id(client: OpenAI) -> None:
    first, second = (
        client.images.with_raw_response.edit(image=PICTURE, prompt="make it night", extra_body=EXTRA).headers
        for _ in range(2)
    )
    assert len(first["x-request-id"]) > 8
    assert first["x-request-id"] != second["x-request-id"]


def test_the_callers_own_request_id_is_kept(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=PICTURE, prompt="", extra_headers={"X-Request-Id": "trace-17"})
    assert refused.value.request_id == "trace-17"


def test_a_stream_shows_its_previews_and_ends_with_the_picture_of_the_plain_edit(
    service: Service, client: OpenAI
) -> None:
    extra = {"num_inference_steps": 9, "seed": 1}
    stream = client.images.edit(image=PICTURE, prompt="make it night", stream=True, partial_images=2, extra_body=extra)
    events = list(stream)
    *partial, completed = events
    assert [type(event) for event in partial] == [ImageEditPartialImageEvent] * 2
    assert isinstance(completed, ImageEditCompletedEvent)
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert {event.size for event in events} == {"16x16"}
    assert completed.usage.output_tokens == 27
    plain = picture_in(service.edit(num_inference_steps=9))
    assert far_apart(decoded(completed.b64_json), plain) <= 1
    assert [far_apart(decoded(event.b64_json), plain) > 1 for event in partial] == [True, True]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stream_has_as_many_previews_as_were_asked_for(client: OpenAI, count: int) -> None:
    stream = client.images.edit(
        image=PICTURE, prompt="make it night", stream=True, partial_images=count,
        extra_body={"num_inference_steps": 8, "seed": 1},
    )  # fmt: skip
    assert [event.type for event in stream] == ["image_edit.partial_image"] * count + ["image_edit.completed"]


def test_previews_come_while_the_edit_is_under_way(client: OpenAI, steps: Steps) -> None:
    steps.let(5)  # of 9: the first preview is due after the third
    stream = client.images.edit(
        image=PICTURE, prompt="make it night", stream=True, partial_images=2,
        extra_body={"num_inference_steps": 9, "seed": 1},
    )  # fmt: skip
    assert next(iter(stream)).type == "image_edit.partial_image"
    assert steps.done <= 5
    steps.let()
    assert [event.type for event in stream][-1] == "image_edit.completed"


def test_a_bad_value_is_a_bad_request_with_its_param_and_code(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=PICTURE, prompt="make it night", extra_body={"num_inference_steps": 0})
    error = refused.value
    assert (error.param, error.code, error.type) == ("num_inference_steps", "invalid_value", "invalid_request_error")
    assert error.request_id == error.response.json()["error"]["request_id"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background", "transparent"), ("quality", "high"), ("response_format", "url"), ("input_fidelity", "high"),
        ("output_format", "gif"), ("markup", PICTURE), ("svg", True), ("complexity", "low"), ("frame_count", 3),
        ("frame_duration_ms", 100),
    ],
)  # fmt: skip
def test_what_openai_has_and_this_server_lacks_is_refused_and_never_ignored(client: OpenAI, name: str, value) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=PICTURE, prompt="make it night", extra_body={name: value, **EXTRA})
    assert refused.value.param == name


@pytest.mark.parametrize("extra", [{"nested": {"a": 1}}, {"several": [1, 2]}, {"steps": 4}])
def test_fields_that_are_not_known_are_refused(client: OpenAI, extra) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=PICTURE, prompt="make it night", extra_body=extra)
    assert refused.value.code == "unknown_parameter"


def test_a_model_that_is_not_there_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.edit(image=PICTURE, prompt="make it night", model="gpt-image-1")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


def test_models_are_listed_with_their_limits(service: Service, client: OpenAI) -> None:
    service.edit()
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "ip2p")
    assert client.models.retrieve("tiny").id == "tiny"
    extra = model.model_extra or {}
    assert (extra["resolution"], extra["size_multiple"]) == (16, 4)
    assert extra["limits"]["max_steps"] == 1000


def test_a_wrong_key_is_an_authentication_error_and_the_right_one_opens(edit_folder: Path) -> None:
    import hashlib

    with serving(edit_folder, key=KEY, key_digests=frozenset([hashlib.sha256(KEY.encode()).digest()])) as locked:
        with pytest.raises(openai.AuthenticationError) as refused:
            client_of(locked, api_key="wrong").images.edit(image=PICTURE, prompt="make it night")
        assert refused.value.code == "invalid_api_key"
        assert client_of(locked).models.list().data[0].id == "tiny"


def test_a_stream_that_cannot_begin_raises_as_a_plain_edit_does(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.edit(image=b"no picture but long enough", prompt="make it night", stream=True, extra_body=EXTRA)
    assert (refused.value.status_code, refused.value.param) == (415, "image")


def test_a_stream_that_fails_on_the_way_raises_the_error_with_its_request_id(client: OpenAI) -> None:
    stream = client.images.edit(
        image=PICTURE, prompt="make it night", stream=True,
        extra_body={"num_inference_steps": 1000, "seed": 1, "deadline_ms": 100},
    )  # fmt: skip
    with pytest.raises(openai.APIError, match="deadline") as failed:
        list(stream)
    assert failed.value.code == "deadline_exceeded"
    body = failed.value.body
    assert isinstance(body, dict)
    assert body["request_id"] == stream.response.headers["x-request-id"]


# ---- a full queue


@pytest.fixture(scope="module")
def narrow(edit_folder: Path) -> Iterator[Service]:
    """Takes in one edit at a time."""
    with serving(edit_folder, max_steps=1000, queue_limit_s=1e-6) as made:
        yield made


def test_a_full_queue_is_a_rate_limit_error(narrow: Service, steps: Steps) -> None:
    with busy(narrow, steps), pytest.raises(openai.RateLimitError) as refused:
        client_of(narrow).images.edit(image=PICTURE, prompt="make it night", extra_body=EXTRA)
    assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
    assert int(refused.value.response.headers["retry-after-ms"]) >= 1


def test_the_client_comes_again_by_itself_when_it_was_told_to(narrow: Service, steps: Steps, monkeypatch) -> None:
    monkeypatch.setattr(narrow.engine(), "cost", FixedCost())
    # Beyond its own first pause of half a second: whoever waits longer was told to.
    long = {**ASKED, "num_inference_steps": 4}
    refusals = narrow.metric("ip2p_requests_total", status="429")
    with ThreadPoolExecutor(2) as people:
        first = people.submit(narrow.edit, headers={"prefer": "respond-async"}, **long)
        until(lambda: steps.asked)
        assert int(narrow.edit().headers["retry-after-ms"]) == pytest.approx(1200, rel=0.05)
        patient = client_of(narrow, max_retries=3)
        began = time.monotonic()
        second = people.submit(patient.images.edit, image=PICTURE, prompt="make it night", extra_body=EXTRA)
        until(lambda: narrow.metric("ip2p_requests_total", status="429") == refusals + 2)
        assert narrow.ask("POST", f"{first.result(30).headers['location']}/cancel").status_code == 202
        steps.let()
        assert second.result(30).data
    assert time.monotonic() - began >= 1.1
    assert narrow.metric("ip2p_requests_total", status="429") == refusals + 2
