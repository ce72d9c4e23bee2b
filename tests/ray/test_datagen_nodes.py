"""The datagen job on nodes that come and go: it takes all, gives them back, and loses nothing with one that dies."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.autoscaling import HEAD_NODE_ID, Nodes
from cluster.head import Cluster, Size, environment, start, stop
from tests.ray.processes import ROOT, wait_until
from tests.ray.test_datagen import made_bytes

pytestmark = [pytest.mark.ray, pytest.mark.weights]

MOST = 2
# As in Kubernetes, the head does no work: the least that there is, is no node.
SIZE = Size(num_cpus=0, num_gpus=0, object_store_mb=100, nodes=Nodes(MOST, cpus=1, idle_s=3))
SETTINGS = ["pairs.candidates=4", "pairs.steps=8", "output.prompts_per_shard=2", "filter.min_direction=0",
            "filter.min_image=0", "filter.min_original=0", "filter.min_edited=0"]  # fmt: skip
PROMPTS = 48
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"  # by which the provider of local nodes tells a raylet who it is


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        cluster = start(SIZE)
    yield cluster
    stop(cluster)


def workers(cluster: Cluster, state: str = "ALIVE") -> set[str]:
    """Ids of the nodes besides the head that the cluster itself knows to be in that state."""
    token = (cluster.folder / "token").read_text()
    asked = urllib.request.Request(f"{cluster.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30) as answer:
        listed = json.load(answer)["data"]["result"]["result"]
    return {node["node_id"] for node in listed if node["state"] == state and node["node_id"] != HEAD_NODE_ID}


class Watch(threading.Thread):
    """How many worker nodes there ever were at a time, while it runs."""

    def __init__(self, cluster: Cluster):
        super().__init__(daemon=True)
        self.cluster, self.most, self.over = cluster, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.3):
            with contextlib.suppress(OSError):  # a busy dashboard; the next look tells
                self.most = max(self.most, len(workers(self.cluster)))


def datagen(cluster: Cluster, output: Path) -> subprocess.Popen[bytes]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, str(ROOT / "jobs" / "datagen.py"), "--recipe", "postcard", "--prompts", str(PROMPTS),
               "--painters", "1:3", "--writers", "1", "--output", str(output), *sets, "--json"]  # fmt: skip
    return subprocess.Popen(command, env=environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(driver: subprocess.Popen[bytes], output: Path) -> dict[str, bytes]:
    """Wait for its end; the files that it leaves, but for those that hold seconds."""
    _, told = driver.communicate(timeout=240)
    assert driver.returncode == 0, told.decode()[-3000:]
    assert json.loads((output / "summary.json").read_text())["prompts"] == PROMPTS
    return made_bytes(output)


def shards_done(output: Path) -> int:
    return len(list((output / "stats").glob("*.json"))) if (output / "stats").exists() else 0


def painting_node(cluster: Cluster) -> tuple[str, set[psutil.Process]] | None:
    """The id and all processes of a node on which a painter is in the middle of a shard."""
    for raylet in processes.strays(cluster.folder):
        with contextlib.suppress(psutil.Error):
            node = raylet.environ().get(NODE_ID, HEAD_NODE_ID) if raylet.name() == "raylet" else HEAD_NODE_ID
            if node == HEAD_NODE_ID:
                continue
            titles = [" ".join(child.cmdline()) for child in raylet.children(recursive=True)]
            if any("Map(PaintShard)).submit" in title for title in titles):
                return node, processes.family(raylet)
    return None


@pytest.mark.timeout(600)
def test_datagen_takes_all_nodes_gives_them_back_and_loses_nothing_with_one(cluster, tmp_path):
    watch = Watch(cluster)
    assert workers(cluster) == set()
    watch.start()
    undisturbed = finished(datagen(cluster, tmp_path / "one"), tmp_path / "one")
    assert len([name for name in undisturbed if name.startswith("stats/")]) == PROMPTS // 2
    wait_until(lambda: not workers(cluster), 90, "every node is given back")
    watch.over.set()
    watch.join(60)
    assert watch.most == MOST

    driver = datagen(cluster, tmp_path / "two")
    try:
        wait_until(lambda: len(workers(cluster)) == MOST, 120, "both nodes of the second run")
        wait_until(lambda: shards_done(tmp_path / "two") >= 2, 120, "first shards")
        node, members = wait_until(lambda: painting_node(cluster), 60, "a node whose painter is at work")
        before = shards_done(tmp_path / "two")
        assert len(members) > 2  # its raylet, and the painter among others
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert before < PROMPTS // 2, "the run was over before a node could be killed"
        wait_until(lambda: node in workers(cluster, "DEAD"), 60, "the cluster has missed the node")
        assert not [process for process in members if processes.is_alive(process)]
        disturbed = finished(driver, tmp_path / "two")
    finally:
        driver.kill()
    assert disturbed == undisturbed
    wait_until(lambda: not workers(cluster), 90, "every node is given back again")
