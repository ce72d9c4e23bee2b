"""``jobs/datagen.py --stage triplets`` on a Ray of its own, killed and run again: it leaves the bytes of a plain loop,
and asks a server for nothing that it has answered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import _triplet_stage, datagen
from jobs._ray import FailedShard, pack, unpack
from jobs._ray_triplets import WriteTripletShard
from tests.ray.processes import ROOT, actor_of, ended, environment, wait_until
from tests.unit.triplets.faulty_server import FaultyServer

CAPTIONS = 60
EMBEDDED = ["writing.captions_per_shard=1", "writing.per_caption=2", "writing.shares=even", "triplets.temperature=1"]
SERVER = ["triplets.writer=http", "triplets.tries=3", "writing.types=none", "writing.near_duplicate=0",
          "writing.captions_per_shard=16", "writing.prompt_price=1000", "writing.completion_price=2000"]  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.weights]


def flags(output: Path, settings: list[str], *more: str) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["--stage", "triplets", "--prompts", str(CAPTIONS), *sets, "--output", str(output), "--json", *more]


def started(flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / "datagen.py"), *flags]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(flags: list[str]) -> dict:
    """The summary that the job prints last."""
    driver = started(flags)
    out, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors[-2000:]
    return json.loads(out.splitlines()[-1])


def killed(driver: subprocess.Popen) -> None:
    """The driver, and what it leaves of its Ray: an actor goes on for a moment."""
    actor = actor_of(driver, "Map(WriteTripletShard)")
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait(30) == -signal.SIGKILL
    wait_until(lambda: actor is None or ended(actor), 60, "the actor's end")


def made(output: Path) -> dict[str, bytes]:
    """Everything that a run leaves; of its summary all but the seconds."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.suffix != ".partial"]
    files = {str(path.relative_to(output)): path.read_bytes() for path in paths}
    summary = json.loads(files.pop("summary.json"))
    return {**files, "summary": json.dumps({**summary, "seconds": 0}).encode()}


def work_without_ray(args, run, pacing, folder, shards, captions) -> None:
    """The last shard first, in this process."""
    actor = WriteTripletShard(run, pacing, folder.uri)
    for shard in reversed(shards):
        done = unpack(actor({"name": shard.name, "payload": pack(shard.rows)})["payload"])
        assert not isinstance(done, FailedShard | Exception), done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triplet_stage, "work", work_without_ray)
        assert datagen.main(flags(output, EMBEDDED)) == 0
    return made(output)


def parts_of(output: Path) -> dict[str, int]:
    """Names of the parts that are whole, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "parts").glob("part-*.parquet")}


@pytest.mark.timeout(600)
def test_a_killed_job_run_again_leaves_the_bytes_of_an_undisturbed_one(tmp_path, monkeypatch, undisturbed):
    output = tmp_path / "run"
    driver = started(flags(output, EMBEDDED))
    wait_until(lambda: len(parts_of(output)) >= 3, 240, "three parts")
    killed(driver)
    early = parts_of(output)
    assert len(early) < CAPTIONS, "the run was over before its driver could be killed"
    assert not (output / "summary.json").exists()

    assert finished(flags(output, EMBEDDED))["captions"] == CAPTIONS
    assert early.items() <= parts_of(output).items(), "finished parts were written again"
    left = made(output)
    assert left.keys() == undisturbed.keys()
    assert [name for name in left if left[name] != undisturbed[name]] == []

    # A third time there is nothing to do: no cluster is joined, and nothing changes.
    monkeypatch.setattr(_triplet_stage, "work", None)
    assert datagen.main(flags(output, EMBEDDED)) == 0
    assert made(output) == left


@pytest.mark.timeout(600)
def test_a_killed_job_run_again_asks_a_server_for_nothing_that_it_has_answered(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    captions, output = tmp_path / "captions.txt", tmp_path / "run"
    captions.write_text("".join(f"A photo of object number {n} on a table\n" for n in range(CAPTIONS)))
    server = FaultyServer(slow_s=0.01)
    settings = [*SERVER, f"triplets.http_url={server.url}"]
    job = flags(output, settings, "--captions", str(captions), "--requests-per-minute", "900")
    try:
        driver = started(job)
        wait_until(lambda: sum(server.answered.values()) >= 25, 240, "25 answers")
        server.gate.clear()  # what is asked from now on gets no answer
        time.sleep(0.5)
        killed(driver)
        cut_off = set(server.keys) - set(server.answered)  # answers to a dead process are nobody's
        delivered = set(server.answered) - cut_off
        assert 25 <= len(delivered) < CAPTIONS
        server.gate.set()
        summary = finished(job)
    finally:
        server.close()
    assert {server.answered[key] for key in delivered} == {1}
    assert summary["captions"] == summary["asked_for"] == sum(summary["by_reason"].values()) == CAPTIONS
    tokens = server.billed_tokens
    assert summary["cost"] >= (tokens[0] * 1000 + tokens[1] * 2000) / 1e6
    assert not list((output / "answers").glob("*.json"))
