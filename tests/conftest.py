"""What every test starts from: no network, few threads, one Ray and one real S3 server a run, both removed after it."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Before torch is imported; more threads than cores make small tensors slower, and Ray's workers inherit it.
os.environ["OMP_NUM_THREADS"] = str(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray in this process's name with 4 CPU slots; starting it takes 5 to 25 s, so it is shared by all tests."""
    import ray

    # Not pytest's own folder: Ray's sockets must stay below 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # with a token Ray writes one into the home folder
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            num_cpus=4,
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A running server; while it runs, AWS_* point every client of this process to it."""

    endpoint: str
    bucket: str


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS on free loopback ports with one empty bucket; unlike a mock it checks keys and survives a kill."""
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    ports = _port_pairs(5)
    server = S3Server(f"http://127.0.0.1:{ports[0]}", "ip2p-test")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in _s3_environment(server).items():
            patch.setenv(name, value)
        process = _start_weed(folder, ports, server.bucket)
        try:
            _wait_until_put_works(server, process, folder / "weed.log")
            yield server
        finally:
            _end(process)
            Path(f"/tmp/seaweedfs-s3-{ports[0]}.sock").unlink(missing_ok=True)  # it has no option for this place
            shutil.rmtree(folder, ignore_errors=True)


def _s3_environment(server: S3Server) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _start_weed(folder: Path, ports: list[int], bucket: str) -> subprocess.Popen[bytes]:
    s3, master, volume, filer, admin = ports
    for name in ("data", "log"):
        (folder / name).mkdir()
    command = [
        *(str(Path(sys.executable).parent / "weed"), f"-logdir={folder / 'log'}", "mini", f"-dir={folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={bucket}", "-master.telemetry=false"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    with (folder / "weed.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _wait_until_put_works(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5))
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    raise RuntimeError(f"the S3 server of the tests did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _port_pairs(count: int) -> list[int]:
    """Ports that are free together with the one 10000 above, where SeaweedFS speaks gRPC."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 22000)
        if port not in ports and _is_free(port) and _is_free(port + 10000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
