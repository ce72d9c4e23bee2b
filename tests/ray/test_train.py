"""The training job on a real local Ray: as without it, and killed in the middle, with the tiny family."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ip2p.models.components import load_base, load_edit_model
from ip2p.storage import open_folder
from ip2p.training.checkpoints import finished_steps, latest_whole, read_checkpoint
from ip2p.training.encoding import PairEncoder
from ip2p.training.loop import train
from ip2p.training.loss import noise_schedule
from ip2p.training.pair_columns import PictureRows
from ip2p.training.pair_index import list_pairs
from ip2p.training.recipe import load_training_recipe
from ip2p.training.state import start_training
from tests.ray.processes import ROOT, actor_of, ended, environment, kill, wait_until
from tests.tiny_family import build_text_to_image
from tests.tiny_pairs import write_run

STEPS, EVERY = 300, 15
SETTINGS = [
    f"steps={STEPS}", f"checkpoint_every={EVERY}", "global_batch=8", "micro_batch=4", "resolution=16", "warmup=2",
    "learning_rate=1e-4", "keep_checkpoints=3",
]  # fmt: skip

TWO_WORKERS = ("--workers", "2", "--threads", "1")

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, str]:
    """A base's folder and a run of pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    build_text_to_image(folder / "base")
    return str(folder / "base"), write_run(folder / "run", range(12))


def start(inputs, output: Path, *more: str) -> subprocess.Popen:
    base, pairs = inputs
    sets = [part for setting in [*SETTINGS, f"base={base}"] for part in ("--set", setting)]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--pairs", pairs, "--output", str(output), *sets,
               "--threads", "2", "--json", "--report-every", "10", "--look-every", "150"]  # fmt: skip
    return subprocess.Popen(
        [*command, *more], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(job: subprocess.Popen) -> tuple[str, str]:
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    return out, err


def weights(output: Path, step: int = STEPS) -> dict[str, bytes]:
    folder = output / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> dict[str, bytes]:
    """The last checkpoint of the same training without Ray, in a process of its own."""
    output = tmp_path_factory.mktemp("plain")
    call = f"from tests.ray.test_train import plain_training; plain_training({inputs!r}, {str(output)!r})"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return weights(output)


def plain_training(inputs: tuple[str, str], output: str) -> None:
    """What a worker does, and nothing around it."""
    base, pairs = inputs
    torch.set_num_threads(2)
    recipe = load_training_recipe("postcard", [*SETTINGS, f"base={base}"])
    model = load_base(base, "cpu")
    source = PictureRows(list_pairs([pairs]), PairEncoder(model.vae, model.text_encoder, model.tokenizer), 16)
    schedule = noise_schedule(model.scheduler_config, model.vae.config)
    state = start_training(model.unet, recipe)
    train(state, source, schedule, checkpoints=open_folder(f"{output}/checkpoints"), lanes=2)


def steps_saved(output: Path) -> list[int]:
    return finished_steps(open_folder(f"{output}/checkpoints")) if (output / "checkpoints").exists() else []


@pytest.mark.timeout(900)
def test_killed_worker_and_killed_driver_leave_the_weights_of_an_undisturbed_run(inputs, undisturbed, tmp_path):
    output = tmp_path / "edit"
    job = start(inputs, output)
    wait_until(lambda: steps_saved(output), 120, "a checkpoint")
    worker = wait_until(lambda: actor_of(job, "RayTrainWorker"), 30, "a training worker")
    kill(worker)
    at_kill = steps_saved(output)[-1]
    assert at_kill < STEPS, "the training had ended before the kill"
    wait_until(lambda: steps_saved(output)[-1] > at_kill, 180, "a checkpoint by the worker that took over")
    assert steps_saved(output)[-1] < STEPS, "the training had ended before the second kill"
    children = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGKILL)
    job.wait(10)
    wait_until(lambda: all(ended(child) for child in children), 120, "the killed driver's Ray to end")
    again = start(inputs, output)
    finished(again)
    ours = weights(output)
    assert [name for name in undisturbed if ours[name] != undisturbed[name]] == []
    # No step twice, none missing.
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == sorted({*range(10, STEPS + 1, 10), *range(EVERY, STEPS + 1, EVERY)})
    assert not (output / "ray").exists()


@pytest.mark.timeout(600)
def test_two_workers_from_a_cache_end_where_one_does_and_the_export_is_the_average(inputs, undisturbed, tmp_path):
    output = tmp_path / "edit"
    out, _ = finished(start(inputs, output, *TWO_WORKERS, "--cache-latents"))
    assert json.loads(out)["step"] == STEPS
    one = torch.cat([t.flatten() for t in _tensors(undisturbed, tmp_path, "ema-000.safetensors")])
    two = torch.cat([t.flatten() for t in load_file(_checkpoint(output) / "ema-000.safetensors").values()])
    assert (one - two).abs().max() < 1e-3  # fp16 in the cache; the sums of two workers differ by less than 1e-4
    assert len(list((output / "grids").glob("*.png"))) == STEPS // 150
    assert list((output / "tensorboard").glob("events*"))
    model = load_edit_model(output / "model", device="cpu")
    averages = read_checkpoint(open_folder(f"{output}/checkpoints"), STEPS).tensors["ema"]
    assert all(torch.equal(averages[name], p) for name, p in model.unet.named_parameters())
    _, again = finished(start(inputs, output, *TWO_WORKERS, "--cache-latents"))
    assert f"already trained to step {STEPS}" in again
    finished(start(inputs, output, *TWO_WORKERS, "--cache-latents", "--set", "guidance_scale=3"))
    assert load_edit_model(output / "model", device="cpu").guidance_scale == 3.0
    assert finished_steps(open_folder(f"{output}/checkpoints"))[-1] == STEPS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [(), ("--shard",)], ids=["each-has-all", "each-has-a-half"])
def test_two_workers_on_pictures_differ_from_one_by_roundings_alone(inputs, undisturbed, tmp_path, flags):
    output = tmp_path / "edit"
    finished(start(inputs, output, *TWO_WORKERS, *flags))
    one = _tensors(undisturbed, tmp_path, "unet-000.safetensors")
    two = load_file(_checkpoint(output) / "unet-000.safetensors").values()
    assert max((a - b).abs().max().item() for a, b in zip(one, two, strict=True)) < 1e-4


@pytest.mark.timeout(300)
def test_a_loss_that_is_no_number_ends_in_one_error_and_keeps_the_last_checkpoint(inputs, tmp_path):
    output = tmp_path / "edit"
    job = start(
        inputs, output, "--set", "learning_rate=1e28", "--set", "max_grad_norm=0", "--set", "checkpoint_every=1"
    )
    started = time.monotonic()
    _, err = job.communicate(timeout=240)
    assert job.returncode == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "loss or gradient is not a finite number" in errors[0]
    assert "lower learning_rate" in errors[0]
    last = latest_whole(open_folder(f"{output}/checkpoints"))
    assert last is not None
    assert all(bool(value.isfinite().all()) for group in last.tensors.values() for value in group.values())
    assert time.monotonic() - started < 200
    assert not (output / "model").exists()


def _checkpoint(output: Path) -> Path:
    return output / "checkpoints" / f"step-{STEPS:08d}"


def _tensors(files: dict[str, bytes], scratch: Path, name: str) -> list[torch.Tensor]:
    (scratch / name).write_bytes(files[name])
    return list(load_file(scratch / name).values())
