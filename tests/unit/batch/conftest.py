from __future__ import annotations

import typing
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ip2p.storage import Folder, LocalFolder, open_folder

REAL_S3 = pytest.param("s3", marks=pytest.mark.service)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries again does so at once."""
    monkeypatch.setattr("ip2p.batch.failures.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("ip2p.batch.failures.LONGEST_WAIT_S", 0.005)


@pytest.fixture(scope="session")
def s3_session(s3_server: typing.Any) -> typing.Any:
    """With the keys of the real S3 server; boto3's own session keeps those of tests before."""
    import boto3

    return boto3.Session()


@pytest.fixture
def s3_uri(s3_server: typing.Any, s3_session: typing.Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh prefix of the real S3 server."""
    from ip2p.batch import chunk_worker

    monkeypatch.setattr("boto3.DEFAULT_SESSION", s3_session)
    chunk_worker._bucket.cache_clear()
    yield f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    chunk_worker._bucket.cache_clear()


@pytest.fixture(params=["local", REAL_S3])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, once on the disk and once on S3."""
    if request.param == "local":
        return LocalFolder(tmp_path / "folder")
    return open_folder(request.getfixturevalue("s3_uri"))
