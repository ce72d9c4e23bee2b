"""Every finding of the doctor, provoked for real where this machine allows it."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ip2p.cli import main
from ip2p.doctor import accelerator
from ip2p.doctor.accelerator import check_driver, check_gpu_memory, check_torch
from ip2p.doctor.command import configure, findings, shown
from ip2p.doctor.finding import ERROR, FINE, WARNING, Finding
from ip2p.doctor.machine import check_disk, check_port, check_python, check_shared_memory
from ip2p.doctor.ray_setup import check_auth, check_cluster, check_ray
from ip2p.doctor.store import check_store
from ip2p.doctor.weights import check_edit_weights, check_recipe_weights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; mounting one needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def nvidia_smi(folder: Path, text: str, code: int = 0) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\ncat <<'TEXT'\n{text}\nTEXT\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


OLD_DRIVER = "| NVIDIA-SMI 470.57.02   Driver Version: 470.57.02   CUDA Version: 11.4 |"
NEW_DRIVER = "| NVIDIA-SMI 999.1   Driver Version: 999.1   CUDA Version: 99.0 |"


def test_an_old_python_and_another_system_are_found() -> None:
    assert check_python().level == FINE
    assert check_python((3, 10, 4)).level == ERROR
    assert "make PYTHON=" in check_python((3, 10, 4)).remedy
    assert check_python((3, 12, 0), "darwin").level == WARNING


def test_a_full_disk_is_found_before_anything_is_written(small_disk: Path) -> None:
    assert check_disk(small_disk / "out" / "deeper", needed=1000).level == FINE
    (small_disk / "filler").write_bytes(bytes(900_000))
    assert check_disk(small_disk, needed=500_000).level == ERROR
    assert "free" in check_disk(small_disk, needed=500_000).remedy
    with (small_disk / "more").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.writelines(itertools.repeat(bytes(4096)))
    found = check_disk(small_disk, needed=0)
    assert (found.level, "cannot be written" in found.found, "free space" in found.remedy) == (ERROR, True, True)


def test_a_folder_without_rights_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)  # root may write everywhere
    found = check_disk(tmp_path)
    assert (found.level, "change its rights" in found.remedy) == (ERROR, True)


def test_little_shared_memory_is_a_warning_with_the_way_to_more(small_disk: Path, tmp_path: Path) -> None:
    assert check_shared_memory(small_disk).level == WARNING
    assert "--shm-size" in check_shared_memory(small_disk).remedy
    assert check_shared_memory(tmp_path / "none").level == WARNING
    assert check_shared_memory(small_disk, needed=1000).level == FINE


def test_a_port_that_is_taken_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = check_port(port)
        assert (found.level, found.found) == (ERROR, f"{port} is taken by another process")
    assert check_port(port).level == FINE


def test_a_driver_too_old_for_torchs_build_is_told_from_one_that_shows_no_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    old = check_driver(nvidia_smi(tmp_path, OLD_DRIVER))
    assert (old.level, old.found) == (ERROR, "driver 470.57.02 knows CUDA up to 11.4, torch was built for 13.2")
    assert "a torch that was built for CUDA 11.4" in old.remedy
    hidden = check_driver(nvidia_smi(tmp_path, NEW_DRIVER))
    assert (hidden.level, "CUDA_VISIBLE_DEVICES" in hidden.remedy) == (ERROR, True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU only" in check_driver(nvidia_smi(tmp_path, NEW_DRIVER)).found


@pytest.mark.parametrize("text", ["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."])
def test_a_machine_without_a_working_driver_is_a_warning(tmp_path, monkeypatch, text: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (nvidia_smi(tmp_path, text, 9), str(tmp_path / "none")):
        assert check_driver(command).level == WARNING


def test_a_gpu_that_torch_can_use_is_fine_and_too_little_memory_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * 2**30, 40 * 2**30))
    assert "A100" in check_driver(nvidia_smi(tmp_path, NEW_DRIVER)).found
    assert check_gpu_memory("postcard").level == FINE
    found = check_gpu_memory("sd15")
    assert (found.level, found.found) == (ERROR, "10.0 of 40.0 GiB free, sd15 needs about 20")


def test_a_torch_that_cannot_be_loaded_is_found(monkeypatch) -> None:
    assert check_torch().level == FINE
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = check_torch()
    assert (found.level, "make env" in found.remedy) == (ERROR, True)


@pytest.mark.service
def test_a_store_is_tried_with_one_file_that_is_gone_afterwards(s3_server, monkeypatch) -> None:
    import boto3

    place = f"s3://{s3_server.bucket}/doctor-here"
    assert check_store(place).level == FINE
    left = boto3.client("s3").list_objects_v2(Bucket=s3_server.bucket, Prefix="doctor-here")
    assert left.get("KeyCount", 0) == 0
    # In a process of its own: boto3 remembers the keys that it was first used with.
    command = [sys.executable, "-c", f"from ip2p.doctor.store import check_store; print(check_store({place!r}))"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    wrong = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "level='error'" in wrong
    assert "cannot write" in wrong
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket policy" in wrong


def test_a_bucket_that_is_not_there_is_found(monkeypatch) -> None:
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        found = check_store("s3://nowhere-at-all/x")
    assert (found.level, "no such bucket" in found.found) == (ERROR, True)


def test_a_store_that_is_out_of_reach_is_found(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    found = check_store("s3://bucket/x")
    assert (found.level, "cannot reach the store" in found.found) == (ERROR, True)


def test_a_store_that_ignores_conditions_is_a_warning(tmp_path, monkeypatch) -> None:
    from ip2p.storage import LocalFolder

    assert check_store(str(tmp_path)).level == FINE
    monkeypatch.setattr(LocalFolder, "write_if", lambda self, name, data, version=None: "always")
    found = check_store(str(tmp_path))
    assert (found.level, "If-None-Match" in found.found) == (WARNING, True)


def test_weights_that_are_missing_or_of_another_kind_are_found(tmp_path) -> None:
    assert check_edit_weights("embedded").level == FINE
    missing = check_edit_weights(str(tmp_path / "none"))
    assert missing.level == ERROR
    assert missing.remedy
    from ip2p.models.components import embedded_folder

    other = check_edit_weights(str(embedded_folder("text_to_image")))
    assert (other.level, "in_channels 4" in other.found) == (ERROR, True)
    assert check_recipe_weights("postcard").level == FINE
    assert check_recipe_weights("sd15").level == ERROR


def test_an_old_ray_is_found(monkeypatch) -> None:
    assert check_ray().level == FINE
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.3")
    assert check_ray().level == ERROR


def test_a_cluster_without_a_token_and_a_token_that_others_can_read_are_found(tmp_path) -> None:
    assert check_auth({}, tmp_path).level == FINE
    assert check_auth({"RAY_AUTH_MODE": "disabled"}, tmp_path).level == WARNING
    assert check_auth({"RAY_ADDRESS": "10.0.0.1:6379"}, tmp_path).level == WARNING
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    found = check_auth({"RAY_AUTH_MODE": "token"}, tmp_path)
    assert (found.level, found.remedy) == (ERROR, f"chmod 600 {token}")
    token.chmod(0o600)
    assert check_auth({"RAY_AUTH_MODE": "token"}, tmp_path).level == FINE


class Dashboard:
    """What answers as a Ray dashboard does."""

    def __init__(self, token: str, version: str):
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
        from threading import Thread

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = not token or self.headers.get("Authorization") == f"Bearer {token}"
                self.send_response(200 if known else 401)
                self.end_headers()
                self.wfile.write(json.dumps({"ray_version": version}).encode() if known else b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    ("token", "version", "mine", "level", "said"),
    [
        ("secret", "2.60.0", "secret", FINE, "asks for its token"),
        ("", "2.60.0", "secret", WARNING, "answers without a token"),
        ("secret", "2.9.0", "secret", ERROR, "runs Ray 2.9.0, here is 2.60.0"),
        ("secret", "2.60.0", "other", ERROR, "401"),
    ],
)
def test_a_cluster_is_asked_for_its_lock_and_its_version(monkeypatch, token, version, mine, level, said) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.60.0")
    dashboard = Dashboard(token, version)
    found = check_cluster({"RAY_API_SERVER_ADDRESS": dashboard.address, "RAY_AUTH_TOKEN": mine})
    dashboard.http.shutdown()
    assert (found.level, said in found.found) == (level, True)


def test_a_cluster_that_does_not_answer_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = check_cluster({"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"})
    assert (found.level, "RAY_API_SERVER_ADDRESS" in found.remedy) == (ERROR, True)
    assert check_cluster({}).level == FINE


def test_the_command_prints_every_finding_and_its_exit_code_is_that_of_the_worst(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["doctor", "--output", str(tmp_path), "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"python", "disk", "shared memory", "ray", "torch", "gpu", "edit model", "weights"} <= {
        one["name"] for one in told
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main(["doctor", "--output", str(tmp_path), "--port", str(server.getsockname()[1])]) == 1
    out = capsys.readouterr().out
    assert "NO   port:" in out
    assert "-> end that process" in out


def test_a_finding_is_shown_with_its_remedy_below() -> None:
    assert shown(Finding("disk", ERROR, "full", "free space")) == "NO   disk: full\n     -> free space"
    assert shown(Finding("disk", FINE, "wide")) == "ok   disk: wide"


def test_where_torch_cannot_be_loaded_nothing_that_needs_it_is_tried(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(accelerator, "check_torch", lambda: Finding("torch", ERROR, "broken", "make env"))
    parser = argparse.ArgumentParser()
    configure(parser)
    names = [one.name for one in findings(parser.parse_args(["--output", str(tmp_path)]))]
    assert names[-1] == "torch"
