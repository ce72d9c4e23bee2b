"""The datagen job on nodes that come and go: it takes all, gives them back, and loses nothing with one that dies."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import processes
from cluster.head import Cluster, environment
from tests.ray.nodes import MOST, cluster_of_nodes, kill_all, node_at_work, workers
from tests.ray.processes import ROOT, wait_until
from tests.ray.test_datagen import made_bytes

pytestmark = [pytest.mark.ray, pytest.mark.weights]

SETTINGS = ["pairs.candidates=4", "pairs.steps=8", "output.prompts_per_shard=2", "filter.min_direction=0",
            "filter.min_image=0", "filter.min_original=0", "filter.min_edited=0"]  # fmt: skip
PROMPTS = 48


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of_nodes() as cluster:
        yield cluster


class Watch(threading.Thread):
    """How many worker nodes there ever were at a time, while it runs."""

    def __init__(self, cluster: Cluster):
        super().__init__(daemon=True)
        self.cluster, self.most, self.over = cluster, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.3):
            with contextlib.suppress(OSError):  # a busy dashboard; the next look tells
                self.most = max(self.most, len(workers(self.cluster)))


def datagen(cluster: Cluster, output: Path, *more: str) -> subprocess.Popen[bytes]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, str(ROOT / "jobs" / "datagen.py"), "--recipe", "postcard", "--prompts", str(PROMPTS),
               "--painters", "1:3", "--writers", "1", "--output", str(output), *sets, "--json", *more]  # fmt: skip
    return subprocess.Popen(command, env=environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(driver: subprocess.Popen[bytes], output: Path) -> dict[str, bytes]:
    """Wait for its end; the files that it leaves, but for those that hold seconds."""
    _, told = driver.communicate(timeout=240)
    assert driver.returncode == 0, told.decode()[-3000:]
    assert json.loads((output / "summary.json").read_text())["prompts"] == PROMPTS
    return made_bytes(output)


def shards_done(output: Path) -> int:
    return len(list((output / "stats").glob("*.json"))) if (output / "stats").exists() else 0


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
        node, members = wait_until(
            lambda: node_at_work(cluster, "Map(PaintShard)).submit"), 60, "a node whose painter is at work"
        )
        before = shards_done(tmp_path / "two")
        assert len(members) > 2  # its raylet, and the painter among others
        kill_all(members)
        assert before < PROMPTS // 2, "the run was over before a node could be killed"
        wait_until(lambda: node in workers(cluster, "DEAD"), 60, "the cluster has missed the node")
        assert not [process for process in members if processes.is_alive(process)]
        disturbed = finished(driver, tmp_path / "two")
    finally:
        driver.kill()
    assert disturbed == undisturbed
    wait_until(lambda: not workers(cluster), 90, "every node is given back again")


@pytest.mark.timeout(600)
def test_pools_on_gpus_bring_the_nodes_that_have_some(tmp_path):
    with cluster_of_nodes(gpus=1) as cluster:
        assert workers(cluster) == set()
        driver = datagen(cluster, tmp_path / "run", "--prompts", "4", "--painter-gpus", "0.8", "--writer-gpus", "0.2")
        try:
            told = driver.communicate(timeout=300)[1].decode()
        finally:
            driver.kill()
    assert driver.returncode == 0, told[-3000:]
    assert "no GPU is there yet: waiting for nodes that have some" in told
