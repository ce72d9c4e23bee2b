"""What Prometheus reads, and a log line a request."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import EDITS, Service, Steps, files_in, until

pytestmark = pytest.mark.service


def test_metrics_are_what_prometheus_reads(service: Service) -> None:
    service.edit()
    answer = service.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert set(families) >= {
        "ip2p_requests", "ip2p_edit_seconds", "ip2p_queue_seconds", "ip2p_queued_work_seconds", "ip2p_unet_calls",
        "ip2p_row_evals", "ip2p_edits", "ip2p_rows_per_call_cap",
    }  # fmt: skip
    assert all(family.documentation for family in families.values())
    assert families["ip2p_edit_seconds"].type == "histogram"


def test_counts_move_with_what_is_done(service: Service) -> None:
    def counted() -> list[float]:
        return [
            service.metric("ip2p_requests_total", route=EDITS, status="200"),
            service.metric("ip2p_requests_total", route=EDITS, status="400"),
            service.metric("ip2p_edits_total", model="tiny", outcome="done"),
            service.metric("ip2p_row_evals_total", model="tiny"),
            service.metric("ip2p_edit_seconds_count", lane="interactive"),
            service.metric("ip2p_queue_seconds_count", lane="batch"),
        ]

    before = counted()
    files_in(service.edit(n=2, num_inference_steps=5))
    files_in(service.edit(priority="batch"))
    service.edit(seed=-1)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 1, 3, 39, 2, 1]


def test_work_that_waits_can_be_seen_while_it_waits(service: Service, steps: Steps) -> None:
    assert service.metric("ip2p_queued_work_seconds") == 0
    with ThreadPoolExecutor(1) as person:
        one = person.submit(service.edit)
        until(lambda: steps.asked)
        assert service.metric("ip2p_queued_work_seconds", model="tiny") > 0
        steps.let()
        one.result(30)
    until(lambda: service.metric("ip2p_queued_work_seconds") == 0)


def test_paths_that_nobody_knows_make_no_new_labels(service: Service) -> None:
    def labels() -> set[str]:
        return {dict(its)["route"] for name, its in service.metrics() if name == "ip2p_requests_total"}

    def ask_all(word: str) -> None:
        for path in (f"/{word}", f"/v1/{word}", f"/v1/edits/{word}", f"/v1/edits/{word}/content", f"/v1/models/{word}"):
            service.get(path)
        service.ask("POST", f"/v1/edits/{word}/cancel")
        service.ask(word.upper(), EDITS)

    ask_all("first")
    known = labels()
    for number in range(5):
        ask_all(f"word{number}")
    assert labels() == known
    assert all("word" not in label for label in known)


def test_every_request_is_one_line_with_its_id(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ip2p.serve"):
        answer = service.edit(headers={"x-request-id": "trace-1"})
        until(lambda: any("trace-1" in record.getMessage() for record in caplog.records))
    lines = [record.getMessage() for record in caplog.records if "trace-1" in record.getMessage()]
    assert answer.headers["x-request-id"] == "trace-1"
    assert len(lines) == 1
    assert re.fullmatch(r"trace-1 POST /v1/images/edits 200 \d+ ms", lines[0])


def test_every_answer_is_safe_in_a_browser(service: Service) -> None:
    for path in ("/", "/nothing", "/metrics", "/v1/models"):
        headers = service.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
