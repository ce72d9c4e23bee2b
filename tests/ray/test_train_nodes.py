"""The training job on nodes that come and go: it takes what there is, and the weights do not show it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import processes
from cluster.head import Cluster, environment
from tests.ray.nodes import cluster_of_nodes, kill_all, node_at_work, workers
from tests.ray.processes import ROOT, wait_until
from tests.ray.test_train import steps_saved
from tests.tiny_family import build_text_to_image
from tests.tiny_pairs import write_run

pytestmark = pytest.mark.ray

STEPS, EVERY = 240, 20
SETTINGS = [
    f"steps={STEPS}", f"checkpoint_every={EVERY}", "global_batch=8", "micro_batch=4", "resolution=16", "warmup=2",
    "learning_rate=1e-5",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of_nodes() as cluster:
        yield cluster


class Training:
    """The job, and what it has said so far."""

    def __init__(self, cluster: Cluster, base: Path, pairs: str, output: Path, size: str):
        sets = [part for setting in [*SETTINGS, f"base={base}"] for part in ("--set", setting)]
        command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--pairs", pairs, "--output", str(output), *sets,
                   "--workers", size, "--threads", "1", "--json", "--look-every", "0"]  # fmt: skip
        self.output, self.said = output, list[str]()
        self.process = subprocess.Popen(
            command, env=environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(self.process.stdout)

    def begun(self) -> list[tuple[int, int]]:
        """Step and number of workers of each start of the group."""
        notes = [json.loads(line)["note"] for line in list(self.said) if line.startswith('{"note": "from step ')]
        return [(int(note.split()[2].rstrip(",")), int(note.split()[3])) for note in notes]

    def ended(self) -> dict[str, torch.Tensor]:
        """The averaged weights that it leaves."""
        try:
            code = self.process.wait(400)
        finally:
            self.process.kill()
        self.listener.join(10)
        assert code == 0, "".join(self.said)[-3000:]
        return load_file(self.output / "checkpoints" / f"step-{STEPS:08d}" / "ema-000.safetensors")


@pytest.mark.timeout(1500)
def test_training_that_loses_a_node_goes_on_and_ends_in_the_weights_of_an_undisturbed_one(cluster, tmp_path):
    build_text_to_image(tmp_path / "base")
    pairs = write_run(tmp_path / "run", range(12))
    # Half a CPU a worker: up to four of them fill both nodes, each killed node takes two along.
    job = Training(cluster, tmp_path / "base", pairs, tmp_path / "edit", "1:4")
    try:
        wait_until(lambda: steps_saved(job.output), 360, "a checkpoint")
        starts = len(job.begun())
        node, members = wait_until(lambda: node_at_work(cluster, "RayTrainWorker"), 30, "a node with a worker")
        kill_all(members)
        saved = steps_saved(job.output)[-1]
        assert saved < STEPS, "the training was over before a node could be killed"
        wait_until(lambda: node in workers(cluster, "DEAD"), 60, "the cluster has missed the node")
        wait_until(lambda: len(job.begun()) > starts, 300, "the group has started again")
        assert job.begun()[starts][0] >= saved - EVERY
        disturbed = job.ended()
    finally:
        job.process.kill()
    assert not [process for process in members if processes.is_alive(process)]
    undisturbed = Training(cluster, tmp_path / "base", pairs, tmp_path / "other", "1").ended()
    assert max((disturbed[name] - value).abs().max().item() for name, value in undisturbed.items()) < 1e-4
    rows = [json.loads(line) for line in (tmp_path / "edit" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({*range(50, STEPS + 1, 50), *range(EVERY, STEPS + 1, EVERY)})
