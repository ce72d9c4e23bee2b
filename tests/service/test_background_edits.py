"""Edits that nobody stays connected for: accepted, followed, fetched, cancelled, forgotten."""

from __future__ import annotations

import time
import typing
from pathlib import Path

import pytest
import requests
from serving import Service, Steps, error_in, events_in, files_in, serving, until

from ip2p.images import decode_image

pytestmark = pytest.mark.service
ASYNC = {"prefer": "respond-async"}


def begun(service: Service, **fields: typing.Any) -> str:
    """The path of an edit that was accepted."""
    answer = service.edit(headers=ASYNC, **fields)
    assert answer.status_code == 202, answer.text
    return answer.headers["location"]


def record(service: Service, path: str) -> dict[str, typing.Any]:
    answer = service.get(path)
    assert answer.status_code == 200, answer.text
    return typing.cast(dict[str, typing.Any], answer.json())


def ended(service: Service, path: str) -> dict[str, typing.Any]:
    return typing.cast(
        dict[str, typing.Any],
        until(lambda: (now := record(service, path))["status"] not in ("queued", "in_progress") and now),
    )


def test_an_edit_is_accepted_at_once_with_its_place(service: Service, steps: Steps) -> None:
    answer = service.edit(headers=ASYNC, n=2)
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    body = answer.json()
    assert answer.headers["location"] == f"/v1/edits/{body['id']}"
    assert (body["object"], body["status"], body["n"], body["steps"], body["steps_done"]) == ("edit", "queued", 2, 6, 0)


def test_status_goes_from_queued_over_steps_to_completed(service: Service, steps: Steps) -> None:
    path = begun(service, num_inference_steps=6)
    assert record(service, path)["status"] == "queued"
    steps.reach(2)
    until(lambda: record(service, path)["steps_done"] == 2)
    assert record(service, path)["status"] == "in_progress"
    steps.let()
    done = ended(service, path)
    assert (done["status"], done["steps_done"]) == ("completed", 6)


def test_the_content_is_the_picture_of_the_plain_edit(service: Service) -> None:
    path = begun(service, n=2, output_format="webp", output_compression=100)
    done = ended(service, path)
    plain = files_in(service.edit(n=2))
    for place, address in enumerate(done["content"]):
        answer = service.get(address)
        assert answer.headers["content-type"] == "image/webp"
        assert abs(decode_image(answer.content).astype(int) - decode_image(plain[place])).max() <= 1
    assert service.get(f"{path}/content").content == service.get(done["content"][0]).content
    assert done["ip2p"]["seeds"] == [1, 2]
    assert done["size"] == "16x16"


@pytest.mark.parametrize("index", ["2", "-1", "one", "1e9", ""])
def test_a_variant_that_is_not_there_is_a_bad_index(service: Service, index: str) -> None:
    path = begun(service, n=2)
    ended(service, path)
    assert error_in(service.get(f"{path}/content?index={index}"), 400)["param"] == "index"


def test_content_before_the_end_is_a_conflict(service: Service, steps: Steps) -> None:
    path = begun(service)
    assert error_in(service.get(f"{path}/content"), 409)["code"] == "edit_not_completed"
    steps.let()
    ended(service, path)
    assert service.get(f"{path}/content").status_code == 200


@pytest.mark.parametrize("path", ["", "/content", "/events", "/cancel"])
def test_an_edit_that_is_not_known_is_not_found(service: Service, path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    assert error_in(service.ask(method, f"/v1/edits/edit-0{path}"), 404)["code"] == "edit_not_found"


def test_a_bad_request_is_refused_before_it_is_accepted(service: Service) -> None:
    assert error_in(service.edit(headers=ASYNC, seed=-1), 400)["param"] == "seed"
    assert error_in(service.edit(b"no picture", headers=ASYNC), 415)["param"] == "image"
    assert error_in(service.edit(headers=ASYNC, stream=True), 400)["param"] == "stream"


def test_an_edit_that_fails_says_why(service: Service) -> None:
    path = begun(service, num_inference_steps=1000, deadline_ms=50)
    failed = ended(service, path)
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "deadline_exceeded"
    assert error_in(service.get(f"{path}/content"), 409)


def test_background_edits_are_counted_as_others_are(service: Service) -> None:
    before = service.metric("ip2p_edit_seconds_count", lane="batch")
    ended(service, begun(service, priority="batch"))
    until(lambda: service.metric("ip2p_edit_seconds_count", lane="batch") == before + 1, seconds=3)


# ---- events


def test_events_tell_of_every_state_in_order(service: Service, steps: Steps) -> None:
    path = begun(service, num_inference_steps=4)
    steps.reach(2)
    until(lambda: record(service, path)["steps_done"] == 2)
    steps.let()
    events = events_in(service.get(f"{path}/events"))
    assert [int(number or -1) for number, _, _ in events] == list(range(len(events)))
    assert (events[0][1], events[-1][1]) == ("edit.queued", "edit.completed")
    done = [data["steps_done"] for _, _, data in events]
    assert done == sorted(done)
    assert 2 in done
    assert all(name == f"edit.{data['status']}" for _, name, data in events)


def test_whoever_comes_back_is_told_what_was_missed_and_no_more(service: Service) -> None:
    path = begun(service)
    ended(service, path)
    events = events_in(service.get(f"{path}/events"))
    again = events_in(service.get(f"{path}/events", {"last-event-id": events[0][0] or ""}))
    assert again == events[1:]


def test_whoever_has_seen_all_is_told_so_at_once(service: Service) -> None:
    path = begun(service)
    ended(service, path)
    last = events_in(service.get(f"{path}/events"))[-1][0] or ""
    try:
        answer = requests.get(f"{service.url}{path}/events", headers={"last-event-id": last}, timeout=2)
    except requests.ConnectionError as error:
        pytest.fail(f"a stream that does not end: {error}")
    assert answer.text == ""


@pytest.mark.parametrize("last", ["", "none", "-5", "\xb2", "9" * 5000, "1.5"])
def test_an_event_id_that_is_none_is_no_failure(service: Service, last: str) -> None:
    path = begun(service)
    ended(service, path)
    answer = requests.get(
        f"{service.url}{path}/events", headers={"last-event-id": last.encode("latin-1")}, stream=True, timeout=10
    )
    answer.close()
    assert answer.status_code in (200, 204, 400)


def test_many_follow_one_edit(service: Service, steps: Steps) -> None:
    path = begun(service)
    followers = [service.get(f"{path}/events", stream=True) for _ in range(5)]
    steps.let()
    assert len({tuple(number for number, _, _ in events_in(one)) for one in followers}) == 1


def test_a_follower_that_leaves_harms_nobody(service: Service, steps: Steps) -> None:
    path = begun(service)
    service.get(f"{path}/events", stream=True).close()
    steps.let()
    assert ended(service, path)["status"] == "completed"


# ---- cancelling


def rows_run(service: Service) -> float:
    return service.metric("ip2p_row_evals_total")


def test_a_cancelled_edit_stops_within_a_step(service: Service, steps: Steps) -> None:
    before, cancelled = rows_run(service), service.metric("ip2p_edits_total", outcome="cancelled")
    path = begun(service, num_inference_steps=500)
    steps.reach(3)
    assert service.ask("POST", f"{path}/cancel").status_code == 202
    until(lambda: all(edit.future.cancelled() for edit in service.engine()._edits), "the wish is known", 2)
    steps.let()
    assert ended(service, path)["status"] == "cancelled"
    until(lambda: service.metric("ip2p_edits_total", outcome="cancelled") == cancelled + 1)
    assert rows_run(service) - before == 4 * 3  # the three steps before, and the one that was under way
    assert error_in(service.get(f"{path}/content"), 409)
    assert events_in(service.get(f"{path}/events"))[-1][1] == "edit.cancelled"


def test_cancelling_what_has_ended_changes_nothing(service: Service) -> None:
    path = begun(service)
    done = ended(service, path)
    assert service.ask("POST", f"{path}/cancel").json() == done
    assert record(service, path) == done
    assert service.get(f"{path}/content").status_code == 200


def test_an_edit_is_cancelled_with_all_its_variants(service: Service, steps: Steps) -> None:
    cancelled = service.metric("ip2p_edits_total", outcome="cancelled")
    path = begun(service, n=3, num_inference_steps=500)
    steps.reach(1)
    service.ask("POST", f"{path}/cancel")
    until(lambda: all(edit.future.cancelled() for edit in service.engine()._edits), "the wish is known", 2)
    steps.let()
    until(lambda: service.metric("ip2p_edits_total", outcome="cancelled") == cancelled + 3)


# ---- the end of the server, and of what it keeps


def test_edits_in_the_background_are_finished_when_the_server_stops(edit_folder: Path, steps: Steps) -> None:
    with serving(edit_folder) as own:
        begun(own)
        until(lambda: steps.asked)
        engine = own.engine()
        own.server.should_exit = True
        own.thread.join(0.7)
        assert own.thread.is_alive()  # for as long as the edit takes
        steps.let()
        own.stop()
        assert engine.ended == {"done": 1}


def test_results_are_forgotten_after_their_time(edit_folder: Path) -> None:
    with serving(edit_folder, job_kept_s=0.3) as own:
        path = begun(own)
        ended(own, path)
        time.sleep(0.35)
        assert error_in(own.get(path), 404)["code"] == "edit_not_found"
        assert error_in(own.get(f"{path}/content"), 404)


def test_an_id_cannot_be_guessed(service: Service) -> None:
    names = [begun(service, num_inference_steps=1).rpartition("/")[2] for _ in range(3)]
    assert len(set(names)) == 3
    assert all(len(name) >= 24 for name in names)
