"""What the pods may do, and that every selector finds the pods that it is written for."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.unit.k8s.rendering import (
    RENDERINGS,
    ROOT,
    TOGETHER,
    Object,
    Pod,
    cluster_spec,
    named,
    pods,
    ray_objects,
    render,
)

EVERY = pytest.mark.parametrize("name", RENDERINGS)
BOTH = pytest.mark.parametrize("platform", TOGETHER)
PLATFORM = {"cpu": "cpu with monitoring", "a100": "a100"}
# What others must make, and its keys. docs/kubernetes.md says how.
SECRETS = {"ip2p-api-keys": {"keys", "metrics"}, "ip2p-redis": {"password"}}
# Pods of other namespaces, by labels that belong to whoever installs them.
OTHERS = [
    {"k8s-app": "kube-dns"},
    {"app.kubernetes.io/name": "kuberay-operator"},
    {"app.kubernetes.io/name": "prometheus"},
]
UNITS = {"Mi": 2**20, "Gi": 2**30}


def size(quantity: str) -> float:
    return float(quantity[:-2]) * UNITS[quantity[-2:]]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """As Kubernetes matches, for the operators that are used here."""
    wanted = selector.get("matchLabels", {}).items()
    one_of = selector.get("matchExpressions", [])
    assert {each["operator"] for each in one_of} <= {"In"}
    return wanted <= labels.items() and all(labels.get(each["key"]) in each["values"] for each in one_of)


def all_pods(platform: str) -> list[Pod]:
    return [pod for name in TOGETHER[platform] for pod in pods(render(name))]


def found(selector: Object, platform: str) -> set[str]:
    return {pod.owner for pod in all_pods(platform) if selects(selector, pod.labels)}


@EVERY
def test_no_container_has_more_rights_than_it_needs(name):
    for pod in pods(render(name)):
        whole = pod.spec["securityContext"]
        assert whole["runAsNonRoot"] is True
        assert whole["runAsUser"] > 0 < whole["fsGroup"], pod.owner
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not set(pod.spec) & {"hostNetwork", "hostPID", "hostIPC"}
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod.owner, container["name"])


@EVERY
def test_every_container_has_an_image_and_limits_and_is_promised_its_memory(name):
    for pod in pods(render(name)):
        for container in pod.containers:
            assert "image" in container or container["name"] == "autoscaler"  # which has the head's
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["limits"]), (pod.owner, container["name"])
            # Kubernetes takes the limits for requests that are not written.
            assert resources.get("requests", resources["limits"])["memory"] == resources["limits"]["memory"]


@EVERY
def test_what_is_written_to_has_a_volume_with_a_bound(name):
    for pod in pods(render(name)):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values()), pod.owner
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert {"/tmp", "/data"} & set(mounts), (pod.owner, container["name"])
            if container["name"] in ("ray-head", "ray-worker"):
                assert volumes[mounts["/tmp/ray"]]["emptyDir"].get("medium", "") == ""  # on disk
                shm = volumes[mounts["/dev/shm"]]["emptyDir"]
                assert shm["medium"] == "Memory"
                # Ray takes 30 % of the container's memory; where less fits it works on the disk, slowly.
                assert 0.3 <= size(shm["sizeLimit"]) / size(container["resources"]["limits"]["memory"]) < 0.5
                assert container["env"][0] == {"name": "HOME", "value": "/tmp"}


@EVERY
def test_every_cluster_asks_for_its_token_and_only_heads_for_kubernetes(name):
    for obj in ray_objects(render(name)):
        spec = cluster_spec(obj)
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "ip2p-head"
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("ip2p-worker", False)


@EVERY
def test_every_ray_container_says_when_it_is_alive_and_ready_without_tools_in_the_image(name):
    for pod in pods(render(name)):
        for container in pod.containers:
            if container["name"] not in ("ray-head", "ray-worker", "redis"):
                continue
            assert {"livenessProbe", "readinessProbe"} <= set(container), pod.owner
            if container["name"] != "redis":
                assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    if name == "cpu":
        service = next(pod for pod in pods(render(name)) if pod.owner == "RayService/ip2p/cpu")
        assert service.containers[0]["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}


@EVERY
def test_no_secret_is_written_anywhere(name):
    objects = render(name)
    assert "Secret" not in {each["kind"] for each in objects}
    for pod in pods(objects):
        for container in pod.containers:
            for variable in container.get("env", []):
                if re.search(r"KEY|TOKEN|PASSWORD|SECRET|AUTH", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}, (pod.owner, variable["name"])
    assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{20}", yaml.safe_dump_all(objects))


def references(value: object, kind: str) -> list[Object]:
    """All values under the name ``kind``, at any depth."""
    if isinstance(value, dict):
        here = [value[kind]] if kind in value else []
        return here + [each for part in value.values() for each in references(part, kind)]
    return [each for part in value for each in references(part, kind)] if isinstance(value, list | tuple) else []


@BOTH
def test_what_is_referred_to_is_made_here_or_told_in_the_documentation(platform):
    objects = [each for name in TOGETHER[platform] for each in render(name)]
    made = {(each["kind"], each["metadata"]["name"]) for each in objects}
    secrets = references(objects, "secretKeyRef") + references(objects, "credentials")
    assert {each["name"] for each in secrets} == set(SECRETS)
    assert all(each["key"] in SECRETS[each["name"]] for each in secrets)
    assert {("ConfigMap", each["name"]) for each in references(objects, "configMapRef")} <= made
    assert {("ServiceAccount", name) for name in references(objects, "serviceAccountName")} <= made
    documentation = (ROOT / "docs" / "kubernetes.md").read_text()
    for name, keys in SECRETS.items():
        (command,) = re.findall(rf"kubectl create secret generic {name} .*?(?<!\\)\n", documentation, re.DOTALL)
        assert set(re.findall(r"--from-literal=(\w+)=", command)) == keys


@BOTH
def test_every_network_policy_finds_the_pods_of_both_its_ends(platform):
    policies = [each for each in render(PLATFORM[platform]) if each["kind"] == "NetworkPolicy"]
    assert len(policies) == 9
    for policy in policies:
        spec = policy["spec"]
        assert found(spec["podSelector"], platform), policy["metadata"]["name"]
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "namespaceSelector" in peer:
                    assert peer["podSelector"]["matchLabels"] in OTHERS
                elif "podSelector" in peer:
                    assert found(peer["podSelector"], platform), policy["metadata"]["name"]
                else:
                    # The address at which every process of a cloud's node finds the node's own rights.
                    assert peer["ipBlock"]["except"] == ["169.254.169.254/32"]


@BOTH
def test_what_nothing_allows_is_denied(platform):
    deny = named(render(PLATFORM[platform]), "NetworkPolicy", "deny-all")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def allowed_in(platform: str, port: int, who: Object, to: str) -> bool:
    """Whether pods with the labels ``who`` (none: somebody outside) may open ``port`` of the pods of ``to``."""
    target = next(pod for pod in all_pods(platform) if pod.owner == to)
    for policy in render(PLATFORM[platform]):
        if policy["kind"] != "NetworkPolicy" or not selects(policy["spec"]["podSelector"], target.labels):
            continue
        for rule in policy["spec"].get("ingress", []):
            peers = [peer.get("podSelector", {}) for peer in rule.get("from", [])]
            ports = [each["port"] for each in rule.get("ports", [])]
            if (not ports or port in ports) and ("from" not in rule or any(selects(peer, who) for peer in peers)):
                return True
    return False


RAY = {"app.kubernetes.io/part-of": "ip2p"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
HEAD = {**RAY, "app.kubernetes.io/component": "endpoint", "ray.io/node-type": "head"}
ENDS = [
    ({}, 8000, "RayService/ip2p/head", True),
    ({}, 8000, "RayService/ip2p/{group}", True),
    ({}, 8000, "RayCluster/interactive/head", False),
    ({}, 8265, "RayService/ip2p/head", False),
    ({}, 6379, "RayService/ip2p/head", False),
    ({}, 6379, "StatefulSet/ip2p-redis", False),
    (RAY, 6379, "RayJob/train/head", True),
    (RAY, 10002, "RayJob/train/head", True),
    (RAY, 6379, "StatefulSet/ip2p-redis", False),
    (HEAD, 6379, "StatefulSet/ip2p-redis", True),
    ({**HEAD, "ray.io/node-type": "redis-cleanup"}, 6379, "StatefulSet/ip2p-redis", True),
    (OPERATOR, 8265, "RayJob/datagen/head", True),
    (OPERATOR, 8265, "RayService/ip2p/head", True),
    (OPERATOR, 8265, "RayService/ip2p/{group}", False),
    ({"app.kubernetes.io/name": "prometheus"}, 8080, "RayJob/datagen/head", True),
    ({"app.kubernetes.io/name": "prometheus"}, 8265, "RayJob/datagen/head", False),
]


@BOTH
@pytest.mark.parametrize(("who", "port", "to", "allowed"), ENDS)
def test_who_may_speak_to_whom(platform, who, port, to, allowed):
    assert allowed_in(platform, port, who, to.format(group=platform)) is allowed


@BOTH
def test_every_budget_finds_pods_and_is_one_that_kubernetes_can_count(platform):
    budgets = {each["metadata"]["name"]: each["spec"] for each in render(platform) if "Budget" in each["kind"]}
    assert found(budgets["ip2p-endpoint"]["selector"], platform) >= {f"RayService/ip2p/{platform}"}
    assert found(budgets["ip2p-job-heads"]["selector"], platform) == {
        f"RayJob/{job}/head" for job in ("datagen", "train", "batch-edit", "evaluate")
    }
    # Pods of a kind without the scale subresource: only a whole minAvailable works, all else blocks every eviction.
    assert {frozenset(each) for each in budgets.values()} == {frozenset({"minAvailable", "selector"})}
    assert all(isinstance(each["minAvailable"], int) for each in budgets.values())


@BOTH
def test_the_service_of_redis_finds_it_and_the_endpoint_asks_there(platform):
    objects = render(platform)
    selector = named(objects, "Service", "ip2p-redis")["spec"]["selector"]
    assert found({"matchLabels": selector}, platform) == {"StatefulSet/ip2p-redis"}
    options = cluster_spec(named(objects, "RayService"))["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis://ip2p-redis:6379"
    assert all("gcsFaultToleranceOptions" not in cluster_spec(named(objects, kind)) for kind in ("RayCluster",))


def test_a100_pods_go_to_a100_nodes_and_datagen_s_to_spot_ones_where_that_is_asked():
    for obj in [*ray_objects(render("a100")), *ray_objects(render("a100 jobs on spot"))]:
        spec = cluster_spec(obj)
        (group,) = spec["workerGroupSpecs"]
        pod = group["template"]["spec"]
        spot = obj["metadata"]["name"] == "datagen"
        assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == "p4d.24xlarge"
        assert pod["nodeSelector"].get("eks.amazonaws.com/capacityType") == ("SPOT" if spot else None)
        assert {each["key"] for each in pod["tolerations"]} == {"nvidia.com/gpu"} | (
            {"eks.amazonaws.com/capacityType"} if spot else set()
        )
        head = spec["headGroupSpec"]["template"]["spec"]
        assert head.get("nodeSelector", {}) == ({"eks.amazonaws.com/capacityType": "ON_DEMAND"} if spot else {})


def test_a_slice_of_a_gpu_is_asked_for_instead_of_a_whole_one():
    (group,) = cluster_spec(named(render("a100 in slices"), "RayService"))["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert {name for name in limits if "/" in name} == {"nvidia.com/mig-2g.10gb"}
    assert group["template"]["spec"]["nodeSelector"]["nvidia.com/mig.config"] == "all-2g.10gb"


def test_the_words_to_replace_are_those_that_the_documentation_names():
    texts = " ".join(path.read_text() for path in (ROOT / "k8s").rglob("*") if path.is_file())
    documentation = (ROOT / "docs" / "kubernetes.md").read_text()
    for word in ("OWNER", "ACCOUNT", "BUCKET", "GATEWAYCLASS"):
        assert word in texts
        assert f"| `{word}` |" in documentation
    images = set(re.findall(r"(?:newName|image): ([^\s,}]+)", texts)) - {"…"}
    assert images == {"ip2p", "ghcr.io/OWNER/ip2p", "redis:7.4.6"}
