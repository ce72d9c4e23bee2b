"""What every test starts from: no network, few threads, one Ray and one real S3 server a run, both removed after it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_s3 import S3Place, new_server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Before torch is imported; more threads than cores make small tensors slower, and Ray's workers inherit it.
os.environ["OMP_NUM_THREADS"] = str(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))


@pytest.fixture(autouse=True)
def no_keys_of_earlier_tests() -> None:
    """boto3 keeps what it found in the environment when it was first asked."""
    if "boto3" in sys.modules:
        sys.modules["boto3"].DEFAULT_SESSION = None


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Place]:
    """SeaweedFS with one empty bucket; while it runs, AWS_* point every client of this process to it."""
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    server = new_server(folder, "ip2p-test")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in server.place.environment().items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server.place
        finally:
            server.stop()
            shutil.rmtree(folder, ignore_errors=True)
