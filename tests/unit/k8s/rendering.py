"""The manifests of k8s/ as ``kubectl apply -k`` would send them, and the pods that KubeRay would make of them."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
Object = dict[str, typing.Any]

# What is rendered: an overlay, then the components that a user may put on it.
RENDERINGS: dict[str, tuple[str, ...]] = {
    "cpu": ("overlays/cpu",),
    "cpu jobs": ("overlays/cpu/jobs",),
    "a100": ("overlays/a100",),
    "a100 jobs": ("overlays/a100/jobs",),
    "a100 in slices": ("overlays/a100", "components/mig"),
    "a100 with incremental upgrade": ("overlays/a100", "components/incremental-upgrade"),
    "cpu with monitoring": ("overlays/cpu", "components/monitoring"),
    "cpu jobs in a queue": ("overlays/cpu/jobs", "components/kueue"),
    "a100 jobs on spot": ("overlays/a100/jobs", "components/spot"),
    "a100 jobs on spot in a queue": ("overlays/a100/jobs", "components/spot", "components/kueue"),
}
# Both are applied to one namespace, so what one names the other may hold.
TOGETHER = {
    "cpu": ("cpu with monitoring", "cpu jobs", "cpu jobs in a queue"),
    "a100": ("a100", "a100 jobs", "a100 in slices", "a100 with incremental upgrade", "a100 jobs on spot"),
}
CLUSTER_SPEC = {"RayCluster": (), "RayService": ("rayClusterConfig",), "RayJob": ("rayClusterSpec",)}


def kustomize() -> list[str]:
    """The command that renders; skips the test where there is none."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    pytest.skip("neither kubectl nor kustomize is on PATH")


@functools.cache
def render(name: str, extra: str = "") -> tuple[Object, ...]:
    """The objects of RENDERINGS[name]; ``extra`` are more lines of the kustomization that a user writes over it."""
    overlay, *components = RENDERINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        paths = [os.path.relpath(ROOT / "k8s" / part, place) for part in (overlay, *components)]
        kustomization = {"resources": paths[:1], "components": paths[1:]} | (yaml.safe_load(extra) or {})
        (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run([*kustomize(), str(place)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{name}: {done.stderr}"
    return tuple(yaml.safe_load_all(done.stdout))


def named(objects: typing.Iterable[Object], kind: str, name: str = "") -> Object:
    """The one object of that kind, and of that name where one is given."""
    (found,) = [each for each in objects if each["kind"] == kind and name in ("", each["metadata"]["name"])]
    return found


def cluster_spec(obj: Object) -> Object:
    """The RayCluster's spec in one of KubeRay's kinds."""
    spec = obj["spec"]
    for step in CLUSTER_SPEC[obj["kind"]]:
        spec = spec[step]
    return spec


def as_cluster(obj: Object) -> Object:
    """The RayCluster that KubeRay would make."""
    metadata = {"name": obj["metadata"]["name"], "namespace": obj["metadata"]["namespace"]}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": cluster_spec(obj)}


def ray_objects(objects: typing.Iterable[Object]) -> list[Object]:
    return [each for each in objects if each["kind"] in CLUSTER_SPEC]


@dataclasses.dataclass(frozen=True)
class Pod:
    """One pod with what is written in its template and what KubeRay adds."""

    owner: str  # kind/name/group
    labels: dict[str, str]
    spec: Object
    containers: tuple[Object, ...]  # all, also those of the start and those that KubeRay adds from options

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", [])}


def pods(objects: typing.Iterable[Object]) -> Iterator[Pod]:
    """All pods that the objects lead to, one for each template."""
    for obj in objects:
        owner = f"{obj['kind']}/{obj['metadata']['name']}"
        if obj["kind"] in CLUSTER_SPEC:
            spec = cluster_spec(obj)
            # The autoscaler's container stands beside the head's, with what autoscalerOptions say.
            beside = [{"name": "autoscaler", **spec["autoscalerOptions"]}] if spec["enableInTreeAutoscaling"] else []
            yield _pod(f"{owner}/head", spec["headGroupSpec"]["template"], beside, _kuberay(owner, "head", "headgroup"))
            for group in spec["workerGroupSpecs"]:
                labels = _kuberay(owner, "worker", group["groupName"])
                yield _pod(f"{owner}/{group['groupName']}", group["template"], [], labels)
        elif "template" in obj.get("spec", {}):
            yield _pod(owner, obj["spec"]["template"], [], {})


def _pod(owner: str, template: Object, beside: list[Object], labels: dict[str, str]) -> Pod:
    spec = template["spec"]
    containers = (*spec["containers"], *spec.get("initContainers", []), *beside)
    return Pod(owner, template["metadata"]["labels"] | labels, spec, containers)


def _kuberay(owner: str, node_type: str, group: str) -> dict[str, str]:
    """Labels that the operator sets and no template overrides (labelPod in its pod.go)."""
    name = owner.split("/")[1]
    return {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": name,
        "ray.io/node-type": node_type,
        "ray.io/group": group,
    }
