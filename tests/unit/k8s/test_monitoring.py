"""The dashboard asks for numbers that somebody exports, and Prometheus finds the pods and ports that have them."""

from __future__ import annotations

import importlib
import json
import re
from types import SimpleNamespace

from serve.metrics import Metrics
from tests.unit.k8s.rendering import ROOT, named, pods, render
from tests.unit.k8s.test_policies import BOTH, PLATFORM, all_pods, selects

DASHBOARD = json.loads((ROOT / "k8s" / "components" / "monitoring" / "dashboard.json").read_text())
PANELS = "ray.dashboard.modules.metrics.dashboards"


def ours() -> set[str]:
    """Every series of /metrics, with an engine behind it that has done something."""
    engine = SimpleNamespace(queued_s=lambda: 1.0, cap=8)
    done = SimpleNamespace(calls=1, row_evals=4, ended={"done": 1})
    engines = SimpleNamespace(loaded=lambda: [SimpleNamespace(name="edit", engine=engine)], done=lambda: {"edit": done})
    metrics = Metrics(engines)  # type: ignore[arg-type]
    metrics.requests.labels("/v1/images/edits", "200").inc()
    metrics.edit_seconds.labels("batch").observe(1)
    metrics.queue_seconds.labels("batch").observe(1)
    return set(re.findall(r"^(ip2p_\w+)", metrics.text().decode(), re.MULTILINE))


def rays() -> set[str]:
    """Every series that Ray's own dashboards, which come with it, ask for."""
    modules = [importlib.import_module(f"{PANELS}.{name}_dashboard_panels") for name in ("default", "serve")]
    texts = " ".join(str(vars(module)) for module in modules)
    return set(re.findall(r"\b((?:ray|autoscaler)_\w+)", texts))


def asked() -> dict[str, set[str]]:
    """Series by panel."""
    word = re.compile(r"\b((?:ip2p|ray|autoscaler)_\w+)\b")
    return {
        panel["title"]: {name for target in panel["targets"] for name in word.findall(target["expr"])}
        for panel in DASHBOARD["panels"]
    }


def test_every_panel_asks_for_series_that_are_exported():
    exported = ours() | rays()
    assert {title: names - exported for title, names in asked().items() if names - exported} == {}
    assert all(asked().values())


def test_every_number_of_an_engine_is_on_the_dashboard():
    shown = set().union(*asked().values())
    families = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in ours()}
    assert families == {re.sub(r"_(bucket|total)$", "", name) for name in shown if name.startswith("ip2p_")}


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) == len(set(places))


def test_grafana_finds_the_dashboard_by_its_label():
    made = named(render("a100"), "ConfigMap", "ip2p-dashboard")
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(made["data"]["dashboard.json"]) == DASHBOARD


@BOTH
def test_every_monitor_finds_pods_and_each_of_its_ports_is_one_of_theirs(platform):
    monitors = [each["spec"] for each in render(PLATFORM[platform]) if each["kind"] == "PodMonitor"]
    assert len(monitors) == 2
    for monitor in monitors:
        matched = [pod for pod in all_pods(platform) if selects(monitor["selector"], pod.labels)]
        for endpoint in monitor["podMetricsEndpoints"]:
            assert any(endpoint["port"] in pod.ports for pod in matched), endpoint


def test_all_ray_pods_export_ray_s_numbers_and_only_heads_the_autoscaler_s():
    for pod in pods(render("a100 jobs")):
        assert pod.ports["metrics"] == 8080
        assert ("as-metrics" in pod.ports) == (pod.labels["ray.io/node-type"] == "head")
