"""Every cluster that the project starts refuses whoever has no token, on every port of every one of its processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import local, processes
from cluster.head import Cluster, clusters, stop
from tests.ray.processes import ROOT, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SMALL = ["--num-cpus", "1", "--num-gpus", "0", "--object-store-mb", "100"]
# Each gives something away, or runs something: jobs on the head and by the agent of any node, state, logs, Serve.
READS = ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/v0/actors", "/api/v0/logs", "/api/v0/nodes",
         "/api/serve/applications/", "/api/cluster_status")  # fmt: skip
SUBMITS = ("/api/jobs/", "/api/job_agent/jobs/")
REFUSED = (401, 403)
# The head has one CPU slot, so two at a time need a node.
NEEDS_A_NODE = """python -c '
import ray, time
ray.init()
ray.get([ray.remote(num_cpus=1)(lambda: time.sleep(30)).remote() for _ in range(2)])
'"""


def since(before: set[Path]) -> Cluster | None:
    return next((one for one in clusters() if one.folder not in before), None)


@contextlib.contextmanager
def up(*flags: str) -> Iterator[Cluster]:
    """`cluster.local up`, which leaves one running."""
    before = {one.folder for one in clusters()}
    try:
        assert local.main(["up", *SMALL, *flags]) == 0
        cluster = since(before)
        assert cluster is not None
        yield cluster
        assert cluster.alive, (cluster.folder / "head.log").read_text()[-3000:]
    finally:
        if left := since(before):
            stop(left)


@contextlib.contextmanager
def run(*flags: str) -> Iterator[Cluster]:
    """`cluster.local run`, for as long as its command lives."""
    before = {one.folder for one in clusters()}
    command = [sys.executable, "-m", "cluster.local", "run", *SMALL, *flags, "--", "sh", "-c", "echo began; exec cat"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdin is not None
        try:
            assert running.stdout.readline() == "began\n"
            cluster = since(before)
            assert cluster is not None
            yield cluster
        finally:
            running.stdin.close()
            assert running.wait(60) == 0


STARTED = {"up": lambda: up(), "run": lambda: run(), "nodes": lambda: up("--nodes", "1", "--node-idle-s", "60")}


@pytest.fixture(scope="module", params=STARTED)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with STARTED[request.param]() as cluster:
        if request.param == "nodes":
            status, _ = asked(f"{cluster.dashboard}/api/jobs/", job(NEEDS_A_NODE), token_of(cluster))
            assert status == 200
            wait_until(lambda: len(raylets(cluster)) == 2, 120, "a second node")
        yield cluster


def job(entrypoint: str) -> bytes:
    return json.dumps({"entrypoint": entrypoint}).encode()


def token_of(cluster: Cluster) -> str:
    return (cluster.folder / "token").read_text()


def asked(url: str, body: bytes | None = None, token: str = "") -> tuple[int, bytes]:
    """Status and answer; (0, b"") where nothing that speaks HTTP answers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, body, headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, http.client.HTTPException):
        return 0, b""


def raylets(cluster: Cluster) -> list[psutil.Process]:
    found = []
    for process in processes.strays(cluster.folder):
        with contextlib.suppress(psutil.NoSuchProcess):  # a job's shell sleeps by a process a second
            if process.name() == "raylet":
                found.append(process)
    return found


def ports(cluster: Cluster) -> set[int]:
    """All on which any process of the cluster listens."""
    head = psutil.Process(cluster.pid)
    found = set()
    for process in processes.family(head) | processes.strays(cluster.folder):
        with contextlib.suppress(psutil.Error):
            found |= {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return found


def refusing(cluster: Cluster) -> list[int]:
    """The ports that speak HTTP and refuse to take a job."""
    return [port for port in ports(cluster) if asked(f"http://127.0.0.1:{port}{SUBMITS[0]}", job("true"))[0] in REFUSED]


@pytest.mark.parametrize("path", READS)
def test_the_dashboard_answers_with_the_token_alone(cluster, path):
    assert asked(f"{cluster.dashboard}{path}")[0] in REFUSED
    assert asked(f"{cluster.dashboard}{path}", token="0" * 64)[0] in REFUSED
    assert asked(f"{cluster.dashboard}{path}", token=token_of(cluster))[0] not in (0, *REFUSED)


def test_a_job_is_taken_with_the_token_alone(cluster, tmp_path):
    place = f"{cluster.dashboard}/api/jobs/"
    for token in ("", "0" * 64):
        assert asked(place, job(f"touch {tmp_path}/ran"), token)[0] in REFUSED
    status, answer = asked(place, job(f"touch {tmp_path}/asked"), token_of(cluster))
    assert (status, "submission_id" in json.loads(answer)) == (200, True)
    wait_until((tmp_path / "asked").exists, 120, "the job that was taken has run")
    assert not (tmp_path / "ran").exists()


def test_no_port_of_any_process_runs_a_job_or_tells_anything_without_the_token(cluster, tmp_path):
    # The agent of a node comes up seconds after its raylet, and all there are to ask should be asked.
    wait_until(lambda: len(refusing(cluster)) > len(raylets(cluster)), 60, "the dashboard and the agent of each node")
    found = ports(cluster)
    assert {cluster.dashboard_port, cluster.gcs_port} <= found
    open_ = []
    spoke = 0
    for port in sorted(found):
        for path in SUBMITS:
            status, _ = asked(f"http://127.0.0.1:{port}{path}", job(f"touch {tmp_path}/ran"))
            spoke += status in REFUSED
            open_ += [(port, path)] if 200 <= status < 300 else []
        for path in READS:
            status, answer = asked(f"http://127.0.0.1:{port}{path}")
            # Ray's metrics are for everybody, and their port gives them for whatever path.
            open_ += [(port, path)] if 200 <= status < 300 and not answer.startswith(b"# HELP") else []
    assert open_ == []
    assert spoke >= 2 * (1 + len(raylets(cluster)))  # the dashboard, and the agent of each node
    assert not (tmp_path / "ran").exists()
