"""What KubeRay's operator (v1.7.0, validation.go) refuses although its CRDs allow it, for the fields used here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from tests.unit.k8s.rendering import Object, cluster_spec

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# 53 leaves room for "-serve-svc", 47 also for the six characters of a cluster's name.
LONGEST_NAME = {"RayCluster": 53, "RayService": 47, "RayJob": 47}
UPGRADES = ("NewCluster", "None", "NewClusterWithIncrementalUpgrade")


def broken_rules(obj: Object) -> list[str]:
    """Sentences, one for each rule that the object breaks."""
    return [*_name(obj), *_cluster(cluster_spec(obj), obj), *_job(obj), *_service(obj)]


def _name(obj: Object) -> Iterator[str]:
    name, longest = obj["metadata"]["name"], LONGEST_NAME[obj["kind"]]
    if len(name) > longest or not DNS_1035.fullmatch(name):
        yield f"name {name!r}: want a DNS-1035 label of at most {longest} characters"


def _cluster(spec: Object, obj: Object) -> Iterator[str]:
    scales = spec.get("enableInTreeAutoscaling", False)
    options = spec.get("autoscalerOptions", {})
    v2 = scales and options.get("version") == "v2"
    head = spec["headGroupSpec"]
    groups = spec.get("workerGroupSpecs", [])
    head_env = _env(head)
    for group in (head, *groups):
        yield from _group_parameters(group)
        if v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "restartPolicy must be Never or unset with autoscaler v2"
    for group in groups:
        yield from _sizes(group, scales)
        yield from _autoscaled(group, spec, scales, bool(v2))
    if "RAY_enable_autoscaler_v2" in head_env:
        yield "RAY_enable_autoscaler_v2 is set beside autoscalerOptions.version"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    yield from _fault_tolerance(spec, head_env, obj)
    if spec.get("authOptions", {}).get("mode") == "token" and _version(spec) < (2, 52):
        yield "authOptions.mode token needs rayVersion 2.52.0 or later"
    if spec.get("networkPolicy") or spec.get("tlsOptions"):
        yield "networkPolicy and tlsOptions need feature gates that are off by default"
    if spec.get("upgradeStrategy") and obj["kind"] != "RayCluster":
        yield "upgradeStrategy belongs to a RayCluster of one's own"


def _group_parameters(group: Object) -> Iterator[str]:
    parameters = group.get("rayStartParams", {})
    if not group["template"]["spec"]["containers"]:
        yield "a group needs a container"
    if group.get("resources") and set(parameters) & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield "resources stand both in rayStartParams and in the group's resources"
    if "labels" in parameters:
        yield "rayStartParams.labels: use the group's labels"


def _sizes(group: Object, scales: bool) -> Iterator[str]:
    name, low, high = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
    if not scales and None in (low, high):
        yield f"{name}: minReplicas and maxReplicas must be set without autoscaling"
    if (low or 0) < 0 or (high or 0) < 0:
        yield f"{name}: negative replicas"
    if None not in (low, high) and low > high:
        yield f"{name}: minReplicas {low} is greater than maxReplicas {high}"


def _autoscaled(group: Object, spec: Object, scales: bool, v2: bool) -> Iterator[str]:
    name = group["groupName"]
    if scales and group.get("suspend"):
        yield f"{name}: suspend is not allowed with autoscaling"
    if group.get("idleTimeoutSeconds") is not None and not v2:
        yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
    if group.get("priority") and (not v2 or _version(spec) < (2, 56)):
        yield f"{name}: priority needs autoscaler v2 and rayVersion 2.56.0 or later"


def _fault_tolerance(spec: Object, head_env: set[str], obj: Object) -> Iterator[str]:
    options = spec.get("gcsFaultToleranceOptions")
    annotations = obj["metadata"].get("annotations", {})
    if options is None:
        if "RAY_REDIS_ADDRESS" in head_env:
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if head_env & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        yield "Redis belongs into gcsFaultToleranceOptions, not into the head's environment"
    if set(annotations) & {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}:
        yield "fault tolerance stands both in annotations and in gcsFaultToleranceOptions"
    if "redis-password" in spec["headGroupSpec"].get("rayStartParams", {}):
        yield "redis-password belongs into gcsFaultToleranceOptions"
    if options.get("backend", "redis") != "redis" or "storage" in options:
        yield "another backend than Redis needs a feature gate that is off by default"


def _job(obj: Object) -> Iterator[str]:
    if obj["kind"] != "RayJob":
        return
    spec = obj["spec"]
    ends = spec.get("shutdownAfterJobFinishes", False)
    if not ends and (spec.get("suspend") or spec.get("ttlSecondsAfterFinished")):
        yield "suspend and ttlSecondsAfterFinished need shutdownAfterJobFinishes"
    if ends and spec.get("deletionStrategy", {}).get("deletionRules"):
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if spec.get("backoffLimit", 0) and (spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode"):
        yield "backoffLimit is not for clusterSelector or InteractiveMode"
    if spec.get("submissionMode") == "SidecarMode" and set(spec) & {"submitterPodTemplate", "submitterConfig"}:
        yield "SidecarMode takes neither submitterPodTemplate nor submitterConfig"
    if any(spec.get(name, 1) <= 0 for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")):
        yield "deadlines must be positive"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _service(obj: Object) -> Iterator[str]:
    if obj["kind"] != "RayService":
        return
    strategy = obj["spec"].get("upgradeStrategy", {})
    if strategy.get("type", "NewCluster") not in UPGRADES:
        yield f"upgradeStrategy.type must be one of {', '.join(UPGRADES)}"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions", {})
        if not cluster_spec(obj).get("enableInTreeAutoscaling"):
            yield "an incremental upgrade needs autoscaling"
        surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
        if not 0 <= step <= surge <= 100:
            yield "want 0 <= stepSizePercent <= maxSurgePercent <= 100"
        if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
            yield "an incremental upgrade needs intervalSeconds and gatewayClassName"
    if obj["spec"].get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    if cluster_spec(obj)["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService must not be named"


def _env(group: Object) -> set[str]:
    return {each["name"] for each in group["template"]["spec"]["containers"][0].get("env", [])}


def _version(spec: Object) -> tuple[int, ...]:
    return tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
