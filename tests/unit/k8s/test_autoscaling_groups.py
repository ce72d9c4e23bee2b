"""Ray's own reading of the manifests: the groups, with their CPUs, GPUs and sizes, that its autoscaler would scale."""

from __future__ import annotations

import argparse
import copy
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from ip2p.config import load_recipe
from ip2p.models.weights_command import configure
from ip2p.training.recipe import load_training_recipe
from jobs import batch_edit, datagen, evaluate, train
from serve.app import Arguments, read_arguments
from tests.unit.k8s.rendering import RENDERINGS, as_cluster, cluster_spec, named, ray_objects, render

JOBS = {"datagen": datagen, "train": train, "batch-edit": batch_edit, "evaluate": evaluate}
GIB = 2**30

CPU = ("cpu", 4, 0, 8, 0, 4)  # group, CPUs, GPUs, GiB, least, most
A100 = ("a100", 11, 1, 128, 0, 8)
EVERY_JOB = ("RayJob/datagen", "RayJob/train", "RayJob/batch-edit", "RayJob/evaluate")
A100_JOBS = {
    "RayJob/datagen": ("a100", 11, 1, 128, 0, 16),
    "RayJob/train": ("a100x8", 88, 8, 1000, 0, 1),
    "RayJob/batch-edit": A100,
    "RayJob/evaluate": A100,
}
INTENDED = {
    "cpu": {"RayCluster/interactive": CPU, "RayService/ip2p": CPU},
    "cpu with monitoring": {"RayCluster/interactive": CPU, "RayService/ip2p": CPU},
    "cpu jobs": dict.fromkeys(EVERY_JOB, CPU),
    "a100": {"RayCluster/interactive": A100, "RayService/ip2p": A100},
    "a100 with incremental upgrade": {"RayCluster/interactive": A100, "RayService/ip2p": A100},
    "a100 in slices": {"RayCluster/interactive": A100, "RayService/ip2p": ("a100-mig", 3, 1, 40, 0, 24)},
    "a100 jobs": A100_JOBS,
    "a100 jobs on spot": A100_JOBS,
}
FIXED = {"cpu jobs in a queue": 4, "a100 jobs on spot in a queue": 4}


def test_every_rendering_is_looked_at():
    assert {*INTENDED, *FIXED} == {*RENDERINGS}


@pytest.mark.parametrize("name", INTENDED)
def test_ray_reads_the_groups_that_are_meant(name):
    found = {}
    for obj in ray_objects(render(name)):
        read = _derive_autoscaling_config_from_ray_cr(as_cluster(obj))
        assert read["idle_timeout_minutes"] == 5
        assert read["provider"]["type"] == "kuberay"
        head = read["available_node_types"]["headgroup"]
        assert (head["resources"]["CPU"], head["resources"].get("GPU", 0)) == (0, 0)
        ((group, kind),) = [item for item in read["available_node_types"].items() if item[0] != "headgroup"]
        resources = kind["resources"]
        found[f"{obj['kind']}/{obj['metadata']['name']}"] = (
            group,
            resources["CPU"],
            resources.get("GPU", 0),
            resources["memory"] / GIB,
            kind["min_workers"],
            kind["max_workers"],
        )
    assert found == INTENDED[name]


@pytest.mark.parametrize("name", FIXED)
def test_a_queue_s_jobs_have_the_one_size_that_the_queue_counts(name):
    for obj in ray_objects(render(name)):
        spec, (group,) = cluster_spec(obj), cluster_spec(obj)["workerGroupSpecs"]
        size = 1 if obj["metadata"]["name"] == "train" else FIXED[name]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (size,) * 3
        assert spec["enableInTreeAutoscaling"] is False
        assert "autoscalerOptions" not in spec
        assert obj["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "user-queue"
        assert obj["spec"]["shutdownAfterJobFinishes"] is True


def test_a_slice_without_a_word_is_no_gpu_to_ray():
    """Why components/mig says num-gpus."""
    cluster = copy.deepcopy(as_cluster(named(render("a100 in slices"), "RayService")))
    del cluster["spec"]["workerGroupSpecs"][0]["rayStartParams"]["num-gpus"]
    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert "GPU" not in kinds["a100-mig"]["resources"]


def test_a_group_without_a_cpu_limit_is_refused_by_ray():
    cluster = copy.deepcopy(as_cluster(named(render("a100"), "RayCluster")))
    del cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    with pytest.raises(ValueError, match="CPU"):
        _derive_autoscaling_config_from_ray_cr(cluster)


def serve_arguments(name: str) -> tuple[ServeDeploySchema, Arguments]:
    config = ServeDeploySchema(**yaml.safe_load(named(render(name), "RayService")["spec"]["serveConfigV2"]))
    return config, read_arguments(config.applications[0].args)


@pytest.mark.parametrize("name", ["cpu", "a100", "a100 in slices"])
def test_the_endpoint_s_replicas_fit_its_group_and_fill_it(name):
    config, arguments = serve_arguments(name)
    _, cpus, gpus, _, _, most = INTENDED[name]["RayService/ip2p"]
    assert arguments.num_cpus <= cpus
    assert arguments.num_gpus == gpus
    # One a pod: two would not fit, and as many as there can be pods.
    assert arguments.num_cpus * 2 > cpus
    assert (arguments.min_replicas, arguments.max_replicas) == (1, most)
    assert config.http_options.host == "0.0.0.0"  # of the pod; 127.0.0.1 would answer nobody
    assert [app.import_path for app in config.applications] == ["serve.app:app"]


def words_of(job: str, name: str, exit_code: int = 0) -> tuple[list[str], int]:
    """The words that the head's shell gives to python for that job, and what the line ends with when python ends so."""
    objects = {"cpu jobs": "cpu", "a100 jobs": "a100"}
    settings = named(render(objects[name]), "ConfigMap", "ip2p-settings")["data"]
    line = named(render(name), "RayJob", job)["spec"]["entrypoint"]
    python = f"python() {{ printf '%s\\n' \"$@\"; return {exit_code}; }}\n"
    done = subprocess.run(["sh", "-c", python + line], env=settings, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines(), done.returncode


@pytest.mark.parametrize("name", ["cpu jobs", "a100 jobs"])
@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_asked_in_words_that_it_knows_for_no_more_than_its_group_holds(name, job):
    (script, *words), _ = words_of(job, name)
    assert script == f"jobs/{job.replace('-', '_')}.py"
    arguments = JOBS[job].arguments(words)
    _, cpus, gpus, _, _, pods = INTENDED[name][f"RayJob/{job}"]
    if job == "datagen":
        load_recipe(arguments.recipe, arguments.set)
        assert arguments.output == "s3://BUCKET/ip2p/run"
        asked = (
            arguments.painters[1] * arguments.painter_gpus + arguments.writers[1] * arguments.writer_gpus,
            arguments.painters[1] * 1.0 + arguments.writers[1] * 0.25 + 1,  # what one reads and writes with
        )
    else:
        most = arguments.workers[1]
        asked = (most * arguments.gpus_per_worker, most * 1.0)
        # Asked for, so that a cluster that has no node yet is not taken for a small one.
        assert arguments.gpus_per_worker == (1 if gpus else 0)
    assert asked[0] <= gpus * pods
    assert asked[1] <= cpus * pods
    if job == "train":
        load_training_recipe(arguments.recipe, arguments.set)
        assert arguments.pairs == ["s3://BUCKET/ip2p/run"]  # what datagen writes


ENDS = [("datagen", 0, 0), ("datagen", 3, 0), ("datagen", 1, 1), ("batch-edit", 3, 0), ("train", 1, 1), ("train", 3, 3)]


@pytest.mark.parametrize(("job", "python_ended", "ends"), ENDS)
def test_a_job_that_finished_with_rows_left_out_is_not_done_again(job, python_ended, ends):
    assert words_of(job, "cpu jobs", python_ended)[1] == ends


def test_the_weights_come_before_the_workers_into_the_folder_that_the_jobs_name():
    spec = cluster_spec(named(render("a100 jobs"), "RayJob", "datagen"))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (first,) = pod["initContainers"]
        assert first["image"] == pod["containers"][0]["image"]
        words = first["command"]
        assert words[:5] == ["python", "-m", "ip2p", "weights", "fetch"]
        parser = argparse.ArgumentParser()
        configure(parser)
        target = parser.parse_args(words[4:]).target
        # A fetched folder appears by a rename, which a volume itself cannot: it lies one below.
        mounts = {Path(mount["mountPath"]): mount["name"] for mount in first["volumeMounts"]}
        assert mounts[target.parent] == "models"
        (seen,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "models"]
        assert (seen["mountPath"], seen["subPath"]) == ("/models", target.name)
    settings = named(render("a100"), "ConfigMap", "ip2p-settings")["data"]
    assert settings["IP2P_MODELS"].startswith("s3://")
    folders = [Path(word.split("=")[-1]) for line in settings.values() for word in line.split() if "/models/" in word]
    assert {folder.parent for folder in folders if folder.is_absolute()} == {Path("/models")}
