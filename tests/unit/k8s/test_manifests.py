"""Every object that is applied is one that Kubernetes and KubeRay take, and one with a slip is not."""

from __future__ import annotations

import copy
import importlib.metadata
import re
import shutil
import subprocess

import pytest
import yaml

from tests.unit.k8s.kuberay_rules import broken_rules
from tests.unit.k8s.rendering import (
    RENDERINGS,
    ROOT,
    Object,
    as_cluster,
    cluster_spec,
    kustomize,
    named,
    ray_objects,
    render,
)
from tests.unit.k8s.schemas import problems

EVERY = pytest.mark.parametrize("name", RENDERINGS)


def changed(obj: Object, path: str, value: object) -> Object:
    """A copy with ``value`` at ``path`` (names and numbers between slashes)."""
    out = copy.deepcopy(obj)
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place = out
    for step in steps:
        place = place[step]
    place[last] = value
    return out


@EVERY
def test_every_object_fits_its_schema(name):
    found = {f"{each['kind']}/{each['metadata']['name']}": problems(each) for each in render(name)}
    assert {key: value for key, value in found.items() if value} == {}


@EVERY
def test_kuberay_takes_every_cluster_job_and_service(name):
    assert [problem for each in ray_objects(render(name)) for problem in broken_rules(each)] == []


@EVERY
def test_everything_lies_in_the_project_s_namespace_and_no_name_comes_twice(name):
    objects = render(name)
    assert {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"} == {"ip2p"}
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    # KubeRay names a service after each of these.
    heads = [each["metadata"]["name"] for each in ray_objects(objects)]
    assert len(heads) == len(set(heads))


@EVERY
def test_every_cluster_runs_the_ray_that_this_project_is_tested_with(name):
    assert {cluster_spec(each)["rayVersion"] for each in ray_objects(render(name))} == {
        importlib.metadata.version("ray")
    }


def test_the_jobs_are_all_there_and_the_pattern_of_their_clusters_is_not_applied():
    for name in ("cpu jobs", "a100 jobs"):
        assert {(each["kind"], each["metadata"]["name"]) for each in render(name)} == {
            ("RayJob", job) for job in ("datagen", "train", "batch-edit", "evaluate")
        }


SLIPS = [
    ("RayCluster", "spec/enableInTreeAutoscalling", True),
    ("RayCluster", "spec/autoscalerOptions/idleTimeoutSeconds", "300"),
    ("RayCluster", "spec/workerGroupSpecs/0/maxReplica", 4),
    ("RayCluster", "spec/workerGroupSpecs/0/template/spec/containers/0/securityContext/runAsNotRoot", True),
    ("RayCluster", "spec/workerGroupSpecs/0/template/spec/containers/0/resources/limits/memory", ["8Gi"]),
    ("RayService", "spec/serveConfig", ""),
    ("RayService", "spec/rayClusterConfig/gcsFaultToleranceOptions/redisAddres", "redis://ip2p-redis:6379"),
    ("RayService", "spec/rayClusterConfig/headGroupSpec/template/spec/volumes/0/emptyDir/size", "1Gi"),
    ("NetworkPolicy", "spec/policyTypes", "Egress"),
    ("PodDisruptionBudget", "spec/minAvailabel", 1),
    ("PodMonitor", "spec/podMetricsEndpoints/0/ports", "metrics"),
    ("ServiceAccount", "automountServiceAccountTokens", False),
    ("StatefulSet", "spec/template/spec/containers/0/imagePullPolicies", "Always"),
]


@pytest.mark.parametrize(("kind", "path", "value"), SLIPS)
def test_a_field_that_is_not_known_or_of_another_type_is_an_error(kind, path, value):
    obj = next(each for each in render("a100") if each["kind"] == kind)
    assert problems(obj) == []
    assert problems(changed(obj, path, value)) != []


CLUSTER, SERVICE = "spec", "spec/rayClusterConfig"
REFUSED = [
    ("RayCluster", "metadata/name", "Ip2p", "DNS-1035"),
    ("RayCluster", f"{CLUSTER}/workerGroupSpecs/0/minReplicas", 9, "is greater than maxReplicas"),
    ("RayCluster", f"{CLUSTER}/workerGroupSpecs/0/suspend", True, "suspend is not allowed"),
    ("RayCluster", f"{CLUSTER}/workerGroupSpecs/0/resources", {"CPU": "4"}, None),
    ("RayCluster", f"{CLUSTER}/headGroupSpec/resources", {"CPU": "4"}, "both in rayStartParams"),
    ("RayCluster", f"{CLUSTER}/headGroupSpec/template/spec/restartPolicy", "Always", "must be Never or unset"),
    ("RayCluster", f"{CLUSTER}/enableInTreeAutoscaling", False, None),
    ("RayCluster", f"{CLUSTER}/rayVersion", "2.51.0", "2.52.0 or later"),
    ("RayCluster", f"{CLUSTER}/networkPolicy", {"mode": "DenyAll"}, "feature gates"),
    ("RayService", f"{SERVICE}/gcsFaultToleranceOptions/backend", "rocksdb", "another backend"),
    ("RayService", f"{SERVICE}/headGroupSpec/template/spec/containers/0/env/0/name", "REDIS_PASSWORD", "Redis belongs"),
    ("RayService", f"{SERVICE}/headGroupSpec/rayStartParams/redis-password", "x", "redis-password belongs"),
    ("RayService", "spec/upgradeStrategy/type", "Recreate", "must be one of"),
    ("RayService", "spec/upgradeStrategy/type", "NewClusterWithIncrementalUpgrade", "stepSizePercent"),
    ("RayJob", "spec/shutdownAfterJobFinishes", False, "need shutdownAfterJobFinishes"),
    ("RayJob", "spec/submissionMode", "InteractiveMode", "not for clusterSelector or InteractiveMode"),
    ("RayJob", "spec/activeDeadlineSeconds", 0, "positive"),
    ("RayJob", "spec/deletionStrategy", {"deletionRules": [{}]}, "exclude each other"),
    ("RayJob", "spec/rayClusterSpec/workerGroupSpecs/0/priority", 5, None),
]


@pytest.mark.parametrize(("kind", "path", "value", "reason"), REFUSED)
def test_what_kuberay_s_operator_refuses_is_found(kind, path, value, reason):
    obj = next(each for each in (*render("a100"), *render("a100 jobs")) if each["kind"] == kind)
    found = " ".join(broken_rules(changed(obj, path, value)))
    assert (reason in found) if reason else not found


def test_a_fixed_pool_needs_both_of_its_bounds():
    obj = named(render("a100 jobs on spot in a queue"), "RayJob", "datagen")
    del cluster_spec(obj := copy.deepcopy(obj))["workerGroupSpecs"][0]["maxReplicas"]
    assert "must be set without autoscaling" in " ".join(broken_rules(obj))


def test_one_word_of_a_user_s_overlay_changes_the_image_of_every_container():
    extra = "images: [{name: ghcr.io/OWNER/ip2p, newName: example.org/me/ip2p, newTag: '7'}]"
    for name in ("a100", "a100 jobs"):
        found = set(re.findall(r"'image': '([^']*)'", str(render(name, extra))))
        assert found - {"redis:7.4.6"} == {"example.org/me/ip2p:7"}, name


def test_the_overlay_that_the_documentation_shows_replaces_what_is_to_be_replaced(tmp_path):
    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL).group(1)
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(shown)
    (mine / "settings.env").write_text((mine.parent / "a100" / "settings.env").read_text().replace("BUCKET", "mine"))
    done = subprocess.run([*kustomize(), str(mine)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"OWNER|ACCOUNT|BUCKET|GATEWAYCLASS", done.stdout)
    objects = list(yaml.safe_load_all(done.stdout))
    assert cluster_spec(named(objects, "RayService"))["workerGroupSpecs"][0]["groupName"] == "a100-mig"
    assert [problem for each in objects for problem in problems(each)] == []


def test_the_image_and_its_placeholder_stand_in_one_place():
    texts = {path: path.read_text() for path in (ROOT / "k8s").rglob("*.yaml")}
    assert [path.parent.name for path, text in texts.items() if re.search(r"newName: (?!…)", text)] == ["cluster"]
    assert len(texts) > 15


def test_the_interactive_cluster_is_the_pattern_of_all_others():
    pattern = as_cluster(named(render("cpu"), "RayCluster"))["spec"]
    for job in ray_objects(render("cpu jobs")):
        labelled = str(cluster_spec(job)).replace("'app.kubernetes.io/component': 'job'", "")
        assert labelled == str(pattern).replace("'app.kubernetes.io/component': 'interactive'", "")
