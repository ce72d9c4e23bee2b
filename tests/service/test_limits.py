"""Where a server says no: full queues, deadlines, large bodies, pictures that a check refuses, and its own failures."""

from __future__ import annotations

import json
import logging
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from serving import (
    EDITS,
    PICTURE,
    FixedCost,
    Service,
    Steps,
    answer_on,
    busy,
    error_in,
    events_in,
    file_of,
    files_in,
    form_body,
    head_of,
    pixels,
    serving,
    until,
)  # fmt: skip

from ip2p.editing.edit_bank import EditBank

pytestmark = pytest.mark.service
MAX_BODY = 20_000


# ---- queues


@pytest.fixture(scope="module")
def narrow(edit_folder: Path) -> Iterator[Service]:
    """Takes in one edit at a time, and bodies of 20 kB."""
    with serving(edit_folder, max_steps=1000, queue_limit_s=1e-6, max_body_bytes=MAX_BODY) as made:
        yield made


@pytest.fixture
def fixed_cost(narrow: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow.engine(), "cost", FixedCost())


@pytest.mark.usefixtures("fixed_cost")
def test_a_full_queue_says_when_to_come_again(narrow: Service, steps: Steps) -> None:
    with busy(narrow, steps, num_inference_steps=60):
        answer = narrow.edit()
        error = error_in(answer, 429)
        assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
        assert int(answer.headers["retry-after-ms"]) == pytest.approx(60 * 3 * 100, rel=0.05)
        assert int(answer.headers["retry-after"]) == pytest.approx(18, abs=1)


@pytest.mark.usefixtures("fixed_cost")
def test_work_that_is_done_does_not_count_as_waiting(narrow: Service, steps: Steps) -> None:
    with busy(narrow, steps, num_inference_steps=60):
        steps.reach(45)
        assert int(narrow.edit().headers["retry-after-ms"]) == pytest.approx(15 * 3 * 100, rel=0.05)


def test_variants_are_taken_in_all_or_none(narrow: Service, steps: Steps) -> None:
    assert error_in(narrow.edit(n=2), 429)
    steps.let()
    until(lambda: narrow.idle)
    assert files_in(narrow.edit())


@pytest.mark.parametrize("how", [{"stream": True}, {"headers": {"prefer": "respond-async"}}])
def test_a_full_queue_says_no_to_every_way_of_asking(narrow: Service, steps: Steps, how) -> None:
    with busy(narrow, steps):
        assert error_in(narrow.edit(**how), 429)["code"] == "queue_full"


# ---- deadlines


def test_a_missed_deadline_is_said_and_not_to_be_tried_again(service: Service) -> None:
    answer = service.edit(num_inference_steps=1000, deadline_ms=100)
    error = error_in(answer, 504)
    assert (error["code"], error["param"], error["type"]) == ("deadline_exceeded", "deadline_ms", "server_error")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.elapsed.total_seconds() < 5


def test_an_edit_within_its_deadline_is_made(service: Service) -> None:
    assert files_in(service.edit(deadline_ms=60_000))


# ---- bodies


def in_pieces(service: Service, body: bytes, size: int) -> requests.Response:
    """The answer to a form whose length is not told beforehand."""
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return service.ask("POST", EDITS, {"content-type": "multipart/form-data; boundary=b"}, data=pieces)


def test_a_body_that_says_how_large_it_is_is_refused(narrow: Service) -> None:
    error = error_in(narrow.edit(PICTURE + bytes(MAX_BODY)), 413)
    assert error["code"] == "body_too_large"
    assert str(MAX_BODY) in error["message"]
    assert files_in(narrow.edit())


def test_a_body_that_does_not_say_how_large_it_is_is_counted(narrow: Service) -> None:
    error = error_in(in_pieces(narrow, form_body(("image", bytes(5 * MAX_BODY))), 1000), 413)
    assert error["code"] == "body_too_large"
    assert files_in(narrow.edit())


def test_a_body_whose_last_piece_is_too_much_is_answered_too(narrow: Service) -> None:
    body = form_body(("image", bytes(MAX_BODY)))
    head = {"content-type": "multipart/form-data; boundary=b", "transfer-encoding": "chunked", "connection": "close"}
    connection = narrow.connected(EDITS, head, f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
    connection.settimeout(3)
    try:
        assert answer_on(connection)[0] == 413
    except TimeoutError:
        pytest.fail("no answer")
    finally:
        connection.close()


def test_a_body_of_several_times_the_limit_still_gets_its_answer(narrow: Service) -> None:
    assert error_in(narrow.edit(bytes(5 * 2**20)), 413)


def test_a_small_body_in_pieces_is_taken(narrow: Service) -> None:
    body = form_body(("prompt", "make it night"), ("num_inference_steps", "1"), ("image", PICTURE))
    assert files_in(in_pieces(narrow, body, 7))


def test_a_body_that_is_one_byte_too_large_is_refused_and_one_that_is_not_is_read(narrow: Service) -> None:
    empty = len(form_body(("unknown", b"")))
    for size, expected in ((MAX_BODY, 400), (MAX_BODY + 1, 413)):
        body = form_body(("unknown", bytes(size - empty)))
        assert len(body) == size
        assert answer_on(narrow.connected(EDITS, head_of(body), body))[0] == expected


# ---- checks of pictures


class Censor:
    """Refuses what it is told to, and breaks where it is told to."""

    def __init__(self) -> None:
        self.refused, self.broken = "", ""
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __call__(self, picture: np.ndarray, which: str) -> str | None:
        self.seen.append((which, picture.shape))
        if which == self.broken:
            raise RuntimeError("the checker lost its glasses")
        return "too gaudy" if which == self.refused else None


@pytest.fixture(scope="module")
def checked(edit_folder: Path) -> Iterator[tuple[Service, Censor]]:
    censor = Censor()
    with serving(edit_folder, picture_check=censor) as made:
        yield made, censor


@pytest.fixture
def censored(checked: tuple[Service, Censor], monkeypatch: pytest.MonkeyPatch) -> tuple[Service, Censor]:
    service, censor = checked
    for name in ("refused", "broken"):
        monkeypatch.setattr(censor, name, "")
    monkeypatch.setattr(censor, "seen", [])
    return service, censor


def test_a_check_sees_what_comes_in_and_what_goes_out(censored: tuple[Service, Censor]) -> None:
    service, censor = censored
    assert len(files_in(service.edit(file_of(pixels(1, 30, 20)), n=2))) == 2
    assert censor.seen == [("input", (20, 30, 3)), ("output", (12, 16, 3)), ("output", (12, 16, 3))]


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_picture_that_the_check_refuses_is_an_error_with_its_reason(censored, which: str) -> None:
    service, censor = censored
    censor.refused = which
    rows = service.engine().row_evals
    error = error_in(service.edit(), 400)
    assert (error["code"], error["param"]) == ("picture_refused", "image")
    assert f"the {which} picture was refused: too gaudy" in error["message"]
    assert (service.engine().row_evals == rows) == (which == "input")


def test_a_picture_that_the_check_refuses_does_not_leave_by_other_ways(censored) -> None:
    service, censor = censored
    censor.refused = "output"
    assert error_in(service.edit(headers={"accept": "image/png"}), 400)["code"] == "picture_refused"
    ((_, name, data),) = events_in(service.edit(stream=True))
    assert (name, data["error"]["code"]) == ("error", "picture_refused")
    path = service.edit(headers={"prefer": "respond-async"}).headers["location"]
    failed = until(lambda: (now := service.get(path).json())["status"] == "failed" and now)
    assert failed["error"]["code"] == "picture_refused"


def test_previews_are_checked_as_results_are(censored) -> None:
    service, censor = censored
    censor.refused = "output"
    events = events_in(service.edit(stream=True, partial_images=2, num_inference_steps=9))
    assert [name for _, name, _ in events] == ["error"]


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_check_that_breaks_is_a_failure_that_the_log_explains(
    censored, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    service, censor = censored
    censor.broken = which
    with caplog.at_level(logging.INFO, "ip2p.serve"):
        error = error_in(service.edit(), 500)
    assert error["type"] == "server_error"
    assert "glasses" not in json.dumps(error)
    told = caplog.text
    assert error["request_id"] in told
    assert "glasses" in told, "the log says nothing of it"


def test_a_broken_check_of_a_background_edit_is_explained_in_the_log(censored, caplog) -> None:
    service, censor = censored
    censor.broken = "output"
    with caplog.at_level(logging.INFO, "ip2p.serve"):
        path = service.edit(headers={"prefer": "respond-async"}).headers["location"]
        until(lambda: service.get(path).json()["status"] == "failed")
    assert "glasses" in caplog.text


# ---- the server's own failures


@pytest.fixture
def failing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bank: EditBank, slots: list[int]) -> typing.NoReturn:
        raise ValueError("tensor at 0x7f00 said no")

    monkeypatch.setattr(EditBank, "step", broken)


@pytest.mark.usefixtures("failing_step")
def test_a_step_that_fails_is_explained_in_the_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ip2p.serve"):
        error = error_in(service.edit(), 500)
    assert (error["code"], error["type"]) == ("edit_failed", "server_error")
    assert "0x7f00" in caplog.text


@pytest.mark.usefixtures("failing_step")
def test_a_step_that_fails_keeps_its_innards_to_itself(service: Service) -> None:
    assert "0x7f00" not in service.edit().text


def test_an_edit_after_one_that_failed_is_made(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    step, failures = EditBank.step, [ValueError("once")]

    def once(bank: EditBank, slots: list[int]) -> None:
        if failures:
            raise failures.pop()
        step(bank, slots)

    monkeypatch.setattr(EditBank, "step", once)
    assert error_in(service.edit(), 500)
    assert files_in(service.edit())


def test_where_one_variant_fails_the_others_are_not_made(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    step, failures, cancelled = EditBank.step, [ValueError("once")], service.engine().ended["cancelled"]

    def one_by_one(bank: EditBank, slots: list[int]) -> None:
        if len(slots) > 1:
            raise ValueError("one at a time")
        if failures:
            raise failures.pop()
        step(bank, slots)

    monkeypatch.setattr(EditBank, "step", one_by_one)
    assert error_in(service.edit(n=3, num_inference_steps=500), 500)
    until(lambda: service.engine().ended["cancelled"] == cancelled + 2)


def test_a_server_whose_model_is_not_there_is_alive_and_not_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "nowhere", ready=False) as lame:
        until(lambda: lame.get("/readyz").json()["status"] == "FAILED")
        assert lame.get("/readyz").status_code == 503
        assert lame.get("/healthz").status_code == 200
        assert error_in(lame.edit(), 500)["type"] == "server_error"


def test_where_models_lie_is_told_to_nobody(tmp_path: Path) -> None:
    with serving(tmp_path / "nowhere", ready=False) as lame:
        until(lambda: lame.get("/readyz").json()["status"] == "FAILED")
        assert str(tmp_path) not in lame.get("/readyz").text + lame.edit().text
