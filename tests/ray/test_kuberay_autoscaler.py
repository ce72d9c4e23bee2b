"""Ray's own KubeRay autoscaler with the RayCluster that k8s/overlays/a100 gives, and a stand-in for Kubernetes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from tests.ray.kuberay_stand_in import KubernetesStandIn, RayNodes
from tests.ray.processes import environment, wait_until
from tests.unit.k8s.rendering import named, render

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
HEAD = "interactive-head"
MOST = 2

# Asks for three GPUs, says which groups' nodes gave the two that there are, and leaves when its input ends.
DRIVER = """
import json, os, sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_gpus=1, num_cpus=0)
class Painter:
    def where(self):
        return os.environ["RAY_NODE_TYPE_NAME"], ray.get_runtime_context().get_node_id()

painters = [Painter.remote() for _ in range(3)]
done, waiting = ray.wait([each.where.remote() for each in painters], num_returns=2, timeout=600)
print(json.dumps({"placed": ray.get(done), "waiting": len(waiting)}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster() -> dict:
    """Ours, but small enough to run here, and quick to give up a node that idles."""
    ours = copy.deepcopy(named(render("a100"), "RayCluster"))
    (group,) = ours["spec"]["workerGroupSpecs"]
    assert (group["groupName"], group["minReplicas"], group["maxReplicas"], group["replicas"]) == ("a100", 0, 8, 0)
    group["maxReplicas"] = MOST
    ours["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] = 5
    return ours


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    # Not pytest's own folder: Ray's sockets must stay below 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="k8s-", dir="/tmp"))
    nodes = RayNodes(folder, get_node_ip_address())
    try:
        yield nodes
    finally:
        try:
            nodes.end()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def kubernetes(cluster: dict, nodes: RayNodes) -> Iterator[KubernetesStandIn]:
    """With the head running and the autoscaler beside it."""
    limits = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    inherited = environment() | {"OMP_NUM_THREADS": "1"}

    def start_pod(name: str, group: str) -> subprocess.Popen:
        return nodes.worker(name, group, int(limits["nvidia.com/gpu"]), inherited)

    stand_in = KubernetesStandIn(cluster, nodes.folder, start_pod)
    start_head(nodes, inherited)
    stand_in.start(HEAD)
    try:
        nodes.autoscaler(cluster, inherited | stand_in.environment())
        yield stand_in
    finally:
        stand_in.stop()


def deleted(kubernetes: KubernetesStandIn) -> set[str]:
    """The pods whose end was asked for by name."""
    values = [operation["value"] for patch in kubernetes.patches for operation in patch]
    return {pod for value in values if isinstance(value, dict) for pod in value.get("workersToDelete") or []}


def start_head(nodes: RayNodes, inherited: dict[str, str], tries: int = 3) -> None:
    """As often as KubeRay would, within reason: Ray gives a node 30 s to start, which busy cores may need."""
    for _ in range(tries):
        head = nodes.head(HEAD, inherited)
        wait_until(lambda head=head: nodes.has_joined(HEAD) or head.poll() is not None, 400, "the head has started")
        if head.poll() is None:
            return
        nodes.clear(HEAD)
    raise AssertionError(nodes.logs())


def waited(holds, timeout_s: float, what: str, nodes: RayNodes) -> None:
    """As ``wait_until``, but a process that has ended ends the waiting too, and the logs are told."""
    try:
        wait_until(lambda: holds() or nodes.ended("driver", "autoscaler", HEAD), timeout_s, what)
        assert holds(), f"{nodes.ended('driver', 'autoscaler', HEAD)} ended before: {what}"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{nodes.logs()}") from None


def test_gpu_work_that_waits_raises_the_a100_group_to_its_maximum_and_its_end_lowers_it_to_none(kubernetes, nodes):
    command = [sys.executable, "-c", DRIVER, nodes.address]
    started = time.monotonic()
    driver = nodes.spawn("driver", command, dict(os.environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    waited(lambda: len(kubernetes.workers("a100")) == MOST, 400, "as many pods as the group may have", nodes)
    # The autoscaler tells every driver what it does, on lines of its own.
    line = next((line for line in driver.stdout if line.startswith("{")), None)
    assert line, nodes.logs()
    told = json.loads(line)
    grown_s = time.monotonic() - started
    assert [group for group, _ in told["placed"]] == ["a100"] * MOST
    assert len({node for _, node in told["placed"]}) == MOST  # one GPU each, as the limits say
    assert told["waiting"] == 1
    assert kubernetes.group("a100")["replicas"] == MOST
    pods = kubernetes.workers("a100")

    ended = time.monotonic()
    driver.stdin.close()
    wait_until(lambda: driver.poll() is not None, 200, "the driver has left")
    wait_until(lambda: not kubernetes.workers("a100"), 240, "no pod of the group is left")
    wait_until(lambda: kubernetes.group("a100")["replicas"] == 0, 60, "no replica is asked for")
    assert nodes.ended("autoscaler", HEAD) == []
    print(f"0 to {MOST} pods with their actors: {grown_s:.1f} s; back to 0: {time.monotonic() - ended:.1f} s")

    assert deleted(kubernetes) == {*pods}  # the autoscaler says which, not only how many
    assert kubernetes.most == {"a100": MOST}  # never more than the group may have
    assert HEAD in kubernetes.pods
    assert kubernetes.problems == []


# Asks for three pods and then gives back all that came, one call after the other, by the part of the autoscaler that
# speaks to Kubernetes.
PROVIDER = """
import json, time
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider

provider = KubeRayProvider("interactive", {"namespace": "ip2p"}, gcs_client=None)

def workers():
    return sorted(name for name, one in provider.get_non_terminated().items() if one.node_type == "a100")

def wait_for(count):
    for _ in range(300):
        if len(workers()) == count:
            return
        time.sleep(0.1)
    raise SystemExit(f"{workers()}: not {count}")

assert workers() == []
provider.launch({"a100": 3}, "launch")
wait_for(2)
came = workers()
provider.terminate(came, "terminate")
wait_for(0)
print(json.dumps({"came": came, "errors": [str(error) for error in provider.poll_errors()]}))
"""


def test_ray_s_provider_reads_and_patches_the_a100_group_over_https(cluster, tmp_path):
    """The same requests without Ray processes, whose start wants a machine with cores to spare: a pod only sleeps."""
    kubernetes = KubernetesStandIn(cluster, tmp_path, lambda name, group: subprocess.Popen(["sleep", "300"]))
    kubernetes.start(HEAD)
    try:
        command = [sys.executable, "-c", PROVIDER]
        variables = environment() | kubernetes.environment() | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
    finally:
        kubernetes.stop()
        for process in kubernetes.running.values():
            process.kill()
    assert len(told["came"]) == MOST == kubernetes.most["a100"]
    assert deleted(kubernetes) == {*told["came"]}
    assert kubernetes.group("a100")["replicas"] == 0
    assert kubernetes.group("a100")["scaleStrategy"]["workersToDelete"] in ([], told["came"])
    assert kubernetes.problems == []
    (error,) = told["errors"]  # the third pod, which the group may not have
    assert "a100" in error
