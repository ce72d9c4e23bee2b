"""What a job and a replica look at before they begin: quick, without torch, and an error stops them."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip2p.doctor import start
from ip2p.doctor.finding import ERROR, FINE, WARNING, Finding
from ip2p.doctor.start import check_build, check_free_memory, check_output, check_served, start_findings, torch_cuda
from ip2p.errors import CheckpointError, DeviceError
from jobs._command import ended, look_around
from tests.unit.doctor.test_doctor import NEW_DRIVER, OLD_DRIVER, nvidia_smi

ROOT = Path(__file__).parents[3]


def test_it_takes_tenths_of_a_second_and_imports_no_torch(tmp_path):
    program = (
        "import sys, time; started = time.perf_counter()\n"
        "from ip2p.doctor.start import start_findings\n"
        f"found = list(start_findings({str(tmp_path / 'out')!r}))\n"
        "print(time.perf_counter() - started, len(found), *{'torch', 'numpy', 'ray', 'boto3'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, count, *loaded = done.stdout.split()
    assert (int(count), loaded) == (3, [])
    if shutil.which("nvidia-smi") is None:
        assert float(seconds) < 0.3


def test_a_driver_too_old_for_torch_is_an_error_and_a_lesser_minor_version_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "torch_cuda", lambda: "13.2")
    old = check_build(nvidia_smi(tmp_path, OLD_DRIVER))
    assert (old.level, old.found) == (ERROR, "driver 470.57.02 knows CUDA up to 11.4, torch was built for 13.2")
    near = nvidia_smi(tmp_path, "| Driver Version: 580.1   CUDA Version: 13.0 |")
    assert check_build(near).level == FINE
    monkeypatch.setattr(start, "torch_cuda", lambda: None)
    assert "built for the CPU only" in check_build(nvidia_smi(tmp_path, NEW_DRIVER)).found
    assert check_build(str(tmp_path / "none")).level == FINE


def test_the_build_is_read_as_torch_itself_says_it():
    import torch

    assert torch_cuda() == torch.version.cuda


@pytest.mark.parametrize(
    ("free", "asked", "level"),
    [("300\n512", 0, ERROR), ("300\n9000", 0, FINE), ("9000", 20, WARNING), ("24000", 20, FINE), ("", 20, FINE)],
)
def test_the_emptiest_gpu_decides(tmp_path, free, asked, level):
    assert check_free_memory(asked, nvidia_smi(tmp_path, free)).level == level


def test_a_disk_that_cannot_be_written_is_an_error_and_one_with_little_room_a_warning(tmp_path, monkeypatch):
    assert check_output(tmp_path / "out").level == FINE
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=500 * 2**20))
    assert check_output(tmp_path).level == WARNING
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=2**20))
    assert check_output(tmp_path).level == ERROR


def test_a_store_is_not_asked_and_work_without_gpus_does_not_look_for_them(monkeypatch):
    def asked(*_: object) -> None:
        raise AssertionError("was asked")

    monkeypatch.setattr(start, "read_driver", asked)
    assert list(start_findings("s3://bucket/x", gpu=False)) == []


def refuse(*_: object, **__: object) -> list[Finding]:
    return [Finding("disk", ERROR, "full", "free space"), Finding("gpu memory", WARNING, "little", "end who holds it")]


def test_a_job_stops_before_it_begins_and_says_one_line_for_each(monkeypatch, capsys):
    monkeypatch.setattr(start, "start_findings", refuse)
    began = []
    args = argparse.Namespace(output="out", quiet=False)
    assert ended(lambda args: began.append(args) or 0, args) == 1
    assert began == []
    assert capsys.readouterr().err.splitlines() == [
        "warning: gpu memory: little; end who holds it", "error: disk: full; free space",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "address", "looked"),
    [
        ({}, "", True),
        ({"gpus_per_worker": None}, "", True),
        ({"gpus_per_worker": 0.0}, "", False),
        ({"painter_gpus": 0.0, "writer_gpus": None}, "", True),
        ({"painter_gpus": 0.0, "writer_gpus": 0.0}, "", False),
        ({}, "10.0.0.1:6379", False),
        ({"via_serve": "http://127.0.0.1:8000"}, "", False),
    ],
)
def test_gpus_are_looked_at_where_the_work_will_be_done_on_them(monkeypatch, flags, address, looked):
    seen = []
    monkeypatch.setattr(start, "start_findings", lambda output, gpu, gpu_gib: seen.append(gpu) or [])
    monkeypatch.setenv("RAY_ADDRESS", address)
    look_around(argparse.Namespace(output="out", **flags))
    assert seen == [looked]


@pytest.mark.parametrize("job", ["datagen", "train", "batch_edit", "evaluate"])
def test_every_job_looks_first(tmp_path, job):
    (tmp_path / "file").write_text("no folder")
    words = {"train": ["--pairs", "out/none"], "batch_edit": ["--manifest", "none.jsonl"]}.get(job, [])
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--output", str(tmp_path / "file"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: disk: ")
    assert "name another folder: --output DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_replica_refuses_a_model_that_is_not_whole_before_it_loads_any(tmp_path, monkeypatch):
    from ip2p.models.components import embedded_folder
    from serve.app import look_around as look_around_replica
    from serve.settings import Settings

    assert check_served(["embedded"]).level == FINE
    broken = tmp_path / "model"
    shutil.copytree(embedded_folder("edit_model"), broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"vae.*found \d+ bytes, expected \d+; fetch the file again"):
        look_around_replica(Settings(models={"good": "embedded", "broken": str(broken)}), gpu=False)
    monkeypatch.setattr("serve.app.start_findings", refuse)
    with pytest.raises(DeviceError, match="disk: full; free space"):
        look_around_replica(Settings(), gpu=True)


def test_a_quick_look_at_whole_models_stays_quick():
    check_served(["embedded"])  # imports torch
    started = time.perf_counter()
    assert check_served(["embedded"]).level == FINE
    assert time.perf_counter() - started < 0.3
