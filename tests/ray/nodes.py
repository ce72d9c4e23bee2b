"""A cluster whose nodes come and go on this machine: what it has, and how one of them is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from cluster import processes
from cluster.autoscaling import HEAD_NODE_ID, Nodes
from cluster.head import Cluster, Size, start, stop
from tests.ray.processes import ROOT

MOST = 2
# As in Kubernetes, the head does no work: the least that there is, is no node.
SIZE = Size(num_cpus=0, num_gpus=0, object_store_mb=100, nodes=Nodes(MOST, cpus=1, idle_s=3))
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"  # by which the provider of local nodes tells a raylet who it is


@contextlib.contextmanager
def cluster_of_nodes(gpus: int = 0) -> Iterator[Cluster]:
    """Nodes of one CPU and ``gpus`` GPU slots, at most MOST of them, none to begin with."""
    size = dataclasses.replace(SIZE, nodes=dataclasses.replace(SIZE.nodes, gpus=gpus))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        cluster = start(size)
    try:
        yield cluster
    finally:
        stop(cluster)


def workers(cluster: Cluster, state: str = "ALIVE") -> set[str]:
    """Ids of the nodes besides the head that the cluster itself knows to be in that state."""
    token = (cluster.folder / "token").read_text()
    asked = urllib.request.Request(f"{cluster.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30) as answer:
        listed = json.load(answer)["data"]["result"]["result"]
    return {node["node_id"] for node in listed if node["state"] == state and node["node_id"] != HEAD_NODE_ID}


def node_at_work(cluster: Cluster, title: str) -> tuple[str, set[psutil.Process]] | None:
    """The id and all processes of a node one of whose processes is called so."""
    for raylet in processes.strays(cluster.folder):
        with contextlib.suppress(psutil.Error):
            node = raylet.environ().get(NODE_ID, HEAD_NODE_ID) if raylet.name() == "raylet" else HEAD_NODE_ID
            if node == HEAD_NODE_ID:
                continue
            titles = [" ".join(child.cmdline()) for child in raylet.children(recursive=True)]
            if any(title in found for found in titles):
                return node, processes.family(raylet)
    return None


def kill_all(members: set[psutil.Process]) -> None:
    """As when a machine's power goes."""
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
