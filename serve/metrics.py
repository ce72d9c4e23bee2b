"""What a server counts, as Prometheus reads it (``GET /metrics``)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ip2p.editing.engine import Edit
from serve.engines import Engines

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self, engines: Engines):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ip2p_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.edit_seconds = Histogram(
            "ip2p_edit_seconds", "From taking an edit in to its picture.", ["lane"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "ip2p_queue_seconds", "From taking an edit in to its first step.", ["lane"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(EngineCollector(engines))

    def count(self, edits: Sequence[Edit]) -> None:
        """Edits that came to their end."""
        for edit in edits:
            lane, ended = "batch" if edit.request.batch else "interactive", edit.ended_at or time.monotonic()
            self.edit_seconds.labels(lane).observe(ended - edit.submitted_at)
            self.queue_seconds.labels(lane).observe((edit.begun_at or ended) - edit.submitted_at)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector:
    """What the engines count themselves, read when asked."""

    def __init__(self, engines: Engines):
        self.engines = engines

    def collect(self):  # type: ignore[no-untyped-def]
        """Metric families, as prometheus_client asks for them."""
        queued = GaugeMetricFamily("ip2p_queued_work_seconds", "Work taken in and not done.", labels=["model"])
        cap = GaugeMetricFamily("ip2p_rows_per_call_cap", "UNet rows that a call has at most.", labels=["model"])
        calls = CounterMetricFamily("ip2p_unet_calls", "UNet calls.", labels=["model"])
        rows = CounterMetricFamily("ip2p_row_evals", "UNet rows that were run.", labels=["model"])
        ended = CounterMetricFamily("ip2p_edits", "Edits by how they ended.", labels=["model", "outcome"])
        for served in self.engines.loaded():
            queued.add_metric([served.name], served.engine.queued_s())
            cap.add_metric([served.name], served.engine.cap)
        for name, done in self.engines.done().items():
            calls.add_metric([name], done.calls)
            rows.add_metric([name], done.row_evals)
            for outcome, count in done.ended.items():
                ended.add_metric([name, outcome], count)
        return [queued, cap, calls, rows, ended]
