"""Batches under test: their pictures and manifests on S3, jobs as processes of one cluster, and what outputs hold."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from cluster.local_s3 import S3Place
from ip2p.images import encode_image
from tests.ray.processes import ROOT, actor_of, environment, kill, wait_until

COUNT, STEPS = 300, 3
ROWS = 3 * STEPS  # of the UNet, an edit
WINDOW = 32  # edits that an actor has under way
WORKERS = 2
REPORTS = {"results.jsonl", "failed.jsonl", "rejected.jsonl", "summary.json", "contact_sheet.png", "output.jsonl",
           "error.jsonl"}  # fmt: skip

Line = dict[str, typing.Any]
Objects = dict[str, tuple[bytes, str, str]]
"""By name: what they hold, ETag, LastModified."""


def picture(number: int) -> bytes:
    return encode_image(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def line(number: int, **more: typing.Any) -> Line:
    """Of a manifest; its edit is that of the undisturbed run if ``more`` says nothing else."""
    image = f"s3://ip2p-test/in/{number:03d}.png"
    return {"id": f"p{number:03d}", "image": image, "instruction": "make it night", "steps": STEPS, **more}


def put(server: S3Place, name: str, data: bytes) -> None:
    server.client().put_object(Bucket=server.bucket, Key=name, Body=data)


def put_pictures(server: S3Place) -> None:
    client = server.client()
    with ThreadPoolExecutor(8) as threads:
        put_one = lambda i: client.put_object(Bucket=server.bucket, Key=f"in/{i:03d}.png", Body=picture(i))  # noqa: E731
        list(threads.map(put_one, range(COUNT)))


def put_lines(server: S3Place, name: str, lines: typing.Iterable[Line | str]) -> str:
    """A manifest; its URI. Texts are written as they are."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    put(server, name, "".join(text + "\n" for text in texts).encode())
    return f"s3://{server.bucket}/{name}"


def names_below(server: S3Place, prefix: str) -> set[str]:
    """Outputs alone: neither reports nor what the job keeps for itself."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=server.bucket, Prefix=f"{prefix}/")
    names = {one["Key"].removeprefix(f"{prefix}/") for page in pages for one in page.get("Contents", ())}
    return {name for name in names - REPORTS if not name.startswith("_job/")}


def outputs_of(server: S3Place, prefix: str) -> Objects:
    client = server.client()

    def got(name: str) -> tuple[bytes, str, str]:
        answer = client.get_object(Bucket=server.bucket, Key=f"{prefix}/{name}")
        return answer["Body"].read(), answer["ETag"], str(answer["LastModified"])

    names = sorted(names_below(server, prefix))
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(names, threads.map(got, names), strict=True))


def lines_of(server: S3Place, name: str) -> list[Line]:
    """Of a .jsonl file; none where it does not exist."""
    client = server.client()
    try:
        data = client.get_object(Bucket=server.bucket, Key=name)["Body"].read()
    except client.exceptions.NoSuchKey:
        return []
    return [json.loads(text) for text in io.BytesIO(data)]


def check_done(server: S3Place, prefix: str, expected: dict[str, bytes], failed: typing.Collection[str] = ()) -> None:
    """Outputs and errors are the inputs, none twice, and all bytes are those of the undisturbed run."""
    made = {name: data for name, (data, *_) in outputs_of(server, prefix).items()}
    assert set(made) == set(expected)
    assert [name for name in made if made[name] != expected[name]] == []
    results = lines_of(server, f"{prefix}/results.jsonl")
    done = [one["output"] for one in results if one["status"] == "done"]
    assert sorted(done) == sorted(expected)
    assert sorted(one["id"] for one in results if one["status"] == "failed") == sorted(failed)
    assert sorted(one["id"] for one in lines_of(server, f"{prefix}/failed.jsonl")) == sorted(failed)
    assert [one["line"] for one in results] == list(range(1, len(results) + 1))


HEAD = """
import logging, sys, ray
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20,
         logging_level=logging.ERROR, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


class Cluster:
    """A Ray that all jobs join, as each starting one would take most of the time. ``variables`` are its workers'."""

    def __init__(self, **variables: str):
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets must stay below 107 bytes
        self.secrets = {"RAY_AUTH_MODE": "disabled"}  # with a token Ray writes one into the home folder
        command = [sys.executable, "-c", HEAD, self.folder]
        env = {**environment(), "PYTHONPATH": str(ROOT), **variables, **self.secrets}
        for _ in range(3):  # Ray gives a node 30 s to start, which may not do on a busy machine
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.process.stdout
            if address := self.process.stdout.readline().strip():
                self.environment = {**self.secrets, "RAY_ADDRESS": address}
                return
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        raise RuntimeError("Ray did not start")

    def actor(self, name: str) -> psutil.Process | None:
        return actor_of(self.process, name)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass
class Job:
    """A process of jobs/batch_edit.py."""

    process: subprocess.Popen[bytes]
    folder: Path  # of what it says
    cluster: Cluster

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def ended(self, code: int = 0, timeout_s: float = 600) -> Line:
        """Its summary, if any."""
        try:
            found = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not within {timeout_s} s: its end; it said\n{self.said[-3000:]}") from None
        assert found == code, f"exit code {found}, not {code}; it said\n{self.said[-3000:]}"
        out = (self.folder / "stdout").read_text().splitlines()
        return json.loads(out[-1]) if out else {}

    def kill(self) -> None:
        """And wait until the cluster has noticed."""
        self.process.kill()
        self.process.wait(10)
        wait_until(lambda: not self.cluster.actor("EditChunks"), 120, "the killed driver's actors to end")

    def kill_an_actor(self) -> None:
        kill(wait_until(lambda: self.cluster.actor("EditChunks.run"), 60, "an actor at work"))


class Jobs:
    """Starts jobs, and ends those that a failed test has left."""

    def __init__(self, folder: Path, model: Path, cluster: Cluster):
        self.folder, self.model, self.cluster = folder, model, cluster
        self.started: list[Job] = []

    def start(self, server: S3Place, output: str, *more: str) -> Job:
        """``output`` is a prefix in the bucket."""
        folder = self.folder / f"job-{len(self.started)}"
        folder.mkdir()
        command = [sys.executable, str(ROOT / "jobs" / "batch_edit.py"), "--output", f"s3://{server.bucket}/{output}",
                   "--ckpt", str(self.model), "--workers", str(WORKERS), "--chunk", "8", "--json"]  # fmt: skip
        env = {**environment(), **server.environment(), **self.cluster.environment}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [*command, *more], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.started.append(Job(process, folder, self.cluster))
        return self.started[-1]

    def end(self) -> None:
        for job in self.started:
            if job.runs:
                job.kill()
