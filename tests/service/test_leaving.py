"""Whoever leaves costs nothing more: the edit goes with its client, within a step, and nobody else is held up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from serving import (
    EDITS,
    PICTURE,
    Service,
    SlowCheck,
    Steps,
    far_apart,
    form_body,
    head_of,
    picture_in,
    serving,
    until,
)  # fmt: skip

pytestmark = pytest.mark.service

LATER = form_body(("prompt", "make it night"), ("num_inference_steps", "40"), ("image", PICTURE))
LONG = form_body(("prompt", "make it night"), ("num_inference_steps", "500"), ("seed", "1"), ("image", PICTURE))


def nobody_waits(service: Service) -> bool:
    return all(edit.future.cancelled() for edit in service.engine()._edits)


def cancelled(service: Service) -> float:
    return service.metric("ip2p_edits_total", outcome="cancelled")


def rows_run(service: Service) -> float:
    return service.metric("ip2p_row_evals_total")


def test_an_edit_goes_with_its_client_within_a_step(service: Service, steps: Steps) -> None:
    rows, gone = rows_run(service), cancelled(service)
    connection = service.connected(EDITS, head_of(LONG), LONG)
    steps.reach(3)
    connection.close()
    until(lambda: nobody_waits(service), "the server sees that the client is gone", 3)
    steps.let()
    until(lambda: cancelled(service) == gone + 1)
    assert rows_run(service) - rows == 4 * 3  # the three steps before, and the one that was under way


def test_an_edit_that_still_waits_its_turn_goes_too(service: Service, steps: Steps) -> None:
    gone = cancelled(service)
    first = service.connected(EDITS, head_of(LONG), LONG)
    until(lambda: steps.asked)
    second = service.connected(EDITS, head_of(LONG), LONG)
    until(lambda: len(service.engine()._edits) == 2)
    second.close()
    first.close()
    until(lambda: nobody_waits(service), seconds=3)
    steps.let()
    until(lambda: cancelled(service) == gone + 2)


def test_all_variants_go_with_their_client(service: Service, steps: Steps) -> None:
    gone = cancelled(service)
    body = form_body(("n", "4"), ("num_inference_steps", "500"), ("prompt", "make it night"), ("image", PICTURE))
    connection = service.connected(EDITS, head_of(body), body)
    until(lambda: len(service.engine()._edits) == 4)
    connection.close()
    until(lambda: nobody_waits(service), seconds=3)
    steps.let()
    until(lambda: cancelled(service) == gone + 4)


def test_a_stream_that_is_closed_takes_its_edit_along(service: Service, steps: Steps) -> None:
    rows, gone = rows_run(service), cancelled(service)
    with OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        steps.let(30)
        stream = client.images.edit(
            image=PICTURE, prompt="make it night", stream=True, partial_images=3,
            extra_body={"num_inference_steps": 100, "seed": 1},
        )  # fmt: skip
        assert next(iter(stream)).type == "image_edit.partial_image"
        until(lambda: steps.asked == 31)
        stream.close()
    until(lambda: nobody_waits(service), seconds=3)
    steps.let()
    until(lambda: cancelled(service) == gone + 1)
    assert rows_run(service) - rows == 31 * 3


def test_a_stream_that_is_closed_before_its_first_event_takes_its_edit_along(service: Service, steps: Steps) -> None:
    gone = cancelled(service)
    service.edit(stream=True, num_inference_steps=500, read=False).close()
    until(lambda: nobody_waits(service), seconds=3)
    steps.let()
    until(lambda: cancelled(service) == gone + 1)


def test_a_stream_that_is_closed_leaves_no_task_behind(
    service: Service, steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    gone = cancelled(service)
    answer = service.edit(stream=True, num_inference_steps=500, read=False)
    until(lambda: steps.asked)
    answer.close()
    until(lambda: nobody_waits(service), seconds=3)
    steps.let()
    until(lambda: cancelled(service) == gone + 1 and service.metric("ip2p_queued_work_seconds") == 0)
    gc.collect()  # asyncio complains of a task that nobody waited for when it is collected
    assert "was destroyed" not in caplog.text


def test_those_who_stay_get_what_they_would_have_got_alone(service: Service, steps: Steps) -> None:
    with ThreadPoolExecutor(2) as people:
        staying = [people.submit(service.edit, seed=seed, num_inference_steps=6) for seed in (4, 5)]
        until(lambda: len(service.engine()._edits) == 2)
        leaving = service.connected(EDITS, head_of(LONG), LONG)
        until(lambda: len(service.engine()._edits) == 3)
        steps.reach(2)
        leaving.close()
        until(lambda: sum(edit.future.cancelled() for edit in service.engine()._edits) == 1)
        steps.let()
        pictures = [picture_in(one.result(30)) for one in staying]
    for made, seed in zip(pictures, (4, 5), strict=True):
        assert far_apart(made, picture_in(service.edit(seed=seed, num_inference_steps=6))) <= 1


def test_a_client_that_leaves_in_the_middle_of_its_upload_is_no_failure_of_the_server(service: Service) -> None:
    def answered(status: str) -> float:
        return service.metric("ip2p_requests_total", route=EDITS, status=status)

    failures, before = answered("500"), service.metric("ip2p_requests_total", route=EDITS)
    service.connected(EDITS, head_of(LONG), LONG[:50]).close()
    until(lambda: service.metric("ip2p_requests_total", route=EDITS) == before + 1)
    assert answered("500") == failures


# ---- before the first step


@pytest.fixture
def looked_at(edit_folder: Path, check: SlowCheck) -> Iterator[Service]:
    """A server whose check of pictures takes its time."""
    with serving(edit_folder, picture_check=check) as made:
        yield made
        check.enough.set()


def test_an_edit_whose_client_left_while_it_was_taken_in_is_not_made(looked_at: Service, check: SlowCheck) -> None:
    connection = looked_at.connected(EDITS, head_of(LATER), LATER)
    assert check.looking.wait(20)
    connection.close()
    until(lambda: looked_at.metric("ip2p_requests_total", status="499") == 1)
    check.enough.set()
    assert looked_at.edit(num_inference_steps=1).status_code == 200  # by now the other is taken in or never will be
    until(lambda: looked_at.idle)
    assert looked_at.engine().ended["done"] == 1


def test_a_stream_whose_client_left_while_it_was_taken_in_is_not_made(looked_at: Service, check: SlowCheck) -> None:
    body = LATER.replace(b"--b--", form_body(("stream", "true")))
    connection = looked_at.connected(EDITS, head_of(body), body)
    assert check.looking.wait(20)
    connection.close()
    check.enough.set()
    until(lambda: looked_at.metric("ip2p_requests_total", route=EDITS) == 1)
    until(lambda: looked_at.idle)
    assert looked_at.engine().ended["done"] == 0
