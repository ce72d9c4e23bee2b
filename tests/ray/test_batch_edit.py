"""The batch job as a process with a real Ray and a real S3 server, while everything around it breaks."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image, PngImagePlugin

from cluster.local_s3 import S3Place, S3Server, new_server
from ip2p.batch.failures import through_outages
from ip2p.batch.lease import Lease
from ip2p.batch.records import Records
from ip2p.images import decode_image
from ip2p.storage import open_folder
from jobs.batch_edit import main, probe
from tests.ray.batches import (
    COUNT,
    ROWS,
    STEPS,
    WINDOW,
    WORKERS,
    Cluster,
    Jobs,
    check_done,
    line,
    lines_of,
    names_below,
    outputs_of,
    picture,
    put,
    put_lines,
    put_pictures,
)  # fmt: skip
from tests.ray.processes import ROOT, environment, wait_until
from tests.ray.s3_proxy import S3Proxy
from tests.tiny_family import build_edit_model

pytestmark = [pytest.mark.ray, pytest.mark.service, pytest.mark.timeout(1800)]
COPY = "--copy"
EDITED_S = 600  # until a job has edited something, on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_edit_model(tmp_path_factory.mktemp("family") / "model")


POISON = """
import os
if place := os.environ.get("IP2P_TEST_DEATHS"):
    from PIL import Image
    opened = Image.open
    def open_or_die(file, *args, **more):
        if hasattr(file, "getvalue") and b"hemlock" in file.getvalue():
            with open(place, "a") as deaths:
                deaths.write("x")
            os._exit(9)
        return opened(file, *args, **more)
    Image.open = open_or_die
"""


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grows with every worker that a poisoned picture kills."""
    return tmp_path_factory.mktemp("deaths") / "deaths"


@pytest.fixture(scope="module")
def cluster(s3_server: S3Place, deaths: Path) -> Iterator[Cluster]:
    """After the server, as workers have its keys from their cluster."""
    (deaths.parent / "sitecustomize.py").write_text(POISON)
    made = Cluster(PYTHONPATH=os.pathsep.join((str(deaths.parent), str(ROOT))), IP2P_TEST_DEATHS=str(deaths))
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def jobs(tmp_path: Path, model: Path, cluster: Cluster) -> Iterator[Jobs]:
    started = Jobs(tmp_path, model, cluster)
    yield started
    started.end()


@pytest.fixture(scope="module")
def store(s3_server: S3Place) -> S3Place:
    """The server that stays whole, with all pictures."""
    put_pictures(s3_server)
    put_lines(s3_server, "all.jsonl", map(line, range(COUNT)))
    return s3_server


@pytest.fixture(scope="module")
def undisturbed(
    store: S3Place, model: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run makes of all lines that nothing disturbs, by name."""
    return run_of_all(store, Jobs(tmp_path_factory.mktemp("undisturbed"), model, cluster), ROWS)


@pytest.fixture(scope="module")
def copied(store: S3Place, model: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same with --copy, which the tests use whose faults lie outside of the editing: it starts faster."""
    return run_of_all(store, Jobs(tmp_path_factory.mktemp("copied"), model, cluster), 0, COPY)


def run_of_all(store: S3Place, jobs: Jobs, rows: int, *more: str) -> dict[str, bytes]:
    output = jobs.folder.name
    try:
        summary = jobs.start(store, output, "--manifest", "s3://ip2p-test/all.jsonl", *more).ended()
    finally:
        jobs.end()
    assert summary["done"] == COUNT
    assert summary["this_run"]["row_evals"] == rows * COUNT
    made = {name: data for name, (data, *_) in outputs_of(store, output).items()}
    assert set(made) == {f"p{i:03d}.png" for i in range(COUNT)}
    return made


@pytest.fixture(scope="module")
def weed() -> Iterator[S3Server]:
    """A server to be hurt, with all pictures. Its data lie on a small disk where we may mount one."""
    folder = Path(tempfile.mkdtemp(prefix="s3-hurt-", dir="/tmp"))
    (folder / "data").mkdir()
    mounted = _mount("-t", "tmpfs", "-o", "size=160m", "tmpfs", str(folder / "data"))
    server = new_server(folder, "ip2p-test")
    try:
        server.start()
        put_pictures(server.place)
        put_lines(server.place, "all.jsonl", map(line, range(COUNT)))
        yield server
    finally:
        server.stop()
        if not mounted:
            subprocess.run(["umount", str(folder / "data")], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def _mount(*arguments: str) -> str:
    """Why it was refused; empty where it was not."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or "mount failed"


def part_of(undisturbed: dict[str, bytes], numbers: range) -> dict[str, bytes]:
    return {f"p{i:03d}.png": undisturbed[f"p{i:03d}.png"] for i in numbers}


# ---- everything is killed


def test_killed_driver_then_killed_actor_and_killed_store_leave_each_output_once_with_undisturbed_bytes(
    weed, undisturbed, jobs
):
    rng = random.Random(11)
    server, manifest = weed.place, ("--manifest", "s3://ip2p-test/all.jsonl")

    def made() -> int:
        return len(names_below(server, "chaos"))

    first, at = jobs.start(server, "chaos", *manifest), rng.randrange(30, 120)
    wait_until(lambda: made() >= at, EDITED_S, f"{at} outputs")
    assert first.runs
    first.kill()
    early = outputs_of(server, "chaos")
    assert at <= len(early) < COUNT, "the job was over before its driver could be killed"

    second, at = jobs.start(server, "chaos", *manifest), len(early) + rng.randrange(10, 50)
    wait_until(lambda: made() >= at or not second.runs, EDITED_S, f"{at} outputs")
    second.kill_an_actor()
    at = made() + rng.randrange(5, 30)
    wait_until(lambda: made() >= at or not second.runs, EDITED_S, f"{at} outputs after an actor was killed")
    weed.kill()
    down_at = time.monotonic()
    assert second.runs, second.said
    time.sleep(rng.uniform(25, 35))
    assert second.runs, f"the job did not outlive {time.monotonic() - down_at:.0f} s without its store:\n{second.said}"
    weed.start()
    summary = second.ended()
    check_done(server, "chaos", undisturbed)
    after = outputs_of(server, "chaos")
    assert {name: after[name] for name in early} == early, "a finished output was written again"
    missing = COUNT - len(early)
    assert summary["this_run"]["row_evals"] <= ROWS * (missing + WINDOW * WORKERS)
    assert summary["this_run"]["found"] + summary["this_run"]["edited"] <= COUNT


def test_a_job_outlives_a_store_that_is_frozen_for_longer_than_its_clients_wait(weed, copied, jobs):
    numbers = range(COUNT)
    manifest = put_lines(weed.place, "frozen.jsonl", map(line, numbers))
    job = jobs.start(weed.place, "frozen", "--manifest", manifest, COPY)
    wait_until(lambda: len(names_below(weed.place, "frozen")) >= 10, EDITED_S, "10 outputs")
    weed.process.send_signal(signal.SIGSTOP)
    try:
        assert job.runs
        time.sleep(35)
        with pytest.raises(BotoCoreError):
            weed.place.client().head_bucket(Bucket=weed.place.bucket)
    finally:
        weed.process.send_signal(signal.SIGCONT)
    job.ended()
    check_done(weed.place, "frozen", part_of(copied, numbers))


def put_many(server: S3Place) -> None:
    for i in range(1000):
        put(server, f"filler/{i}", random.randbytes(2**16))


def test_a_job_waits_while_the_stores_disk_is_full_and_ends_when_it_is_not(weed, copied, jobs):
    if refused := None if os.path.ismount(weed.folder / "data") else "no right to mount a small disk":
        pytest.skip(refused)
    server, numbers = weed.place, range(COUNT)
    manifest = put_lines(server, "full.jsonl", map(line, numbers))
    job = jobs.start(server, "full", "--manifest", manifest, COPY)
    wait_until(lambda: len(names_below(server, "full")) >= 10, EDITED_S, "10 outputs")
    ballast = weed.folder / "data" / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**12))
        with pytest.raises(ClientError):
            put_many(server)  # what has been set aside may take some still
        stood_at = len(names_below(server, "full"))
        assert stood_at < len(numbers)
        time.sleep(20)
        assert job.runs, job.said
    finally:
        ballast.unlink()
    # A full disk may leave the server's own database refusing writes until it is opened anew, as whoever frees a disk
    # finds out; the job is not started again.
    weed.stop()
    weed.start()
    job.ended()
    check_done(server, "full", part_of(copied, numbers))


# ---- the way to the store is bad


def test_a_store_that_is_busy_for_a_fifth_of_all_requests_costs_no_item(store, copied, jobs):
    numbers = range(60)
    manifest = put_lines(store, "busy.jsonl", map(line, numbers))
    with S3Proxy(store, seed=1, slow_down=0.2) as proxy:
        jobs.start(proxy.server, "busy", "--manifest", manifest, COPY).ended()
    assert proxy.done["SlowDown"] > 40
    check_done(store, "busy", part_of(copied, numbers))
    assert {proxy.written[f"busy/p{i:03d}.png"] for i in numbers} == {1}


def test_connections_that_break_anywhere_leave_no_torn_output_and_none_out(store, copied, jobs):
    numbers = range(60)
    manifest = put_lines(store, "cut.jsonl", map(line, numbers))
    with S3Proxy(store, seed=2, cut=0.1) as proxy:
        jobs.start(proxy.server, "cut", "--manifest", manifest, COPY).ended()
    assert min(proxy.done["cut request"], proxy.done["cut answer"]) >= 5, proxy.done
    check_done(store, "cut", part_of(copied, numbers))
    assert {proxy.written[f"cut/p{i:03d}.png"] for i in numbers} == {1}


@pytest.fixture
def torn(store: S3Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """A way to the store on which every third request breaks."""
    with S3Proxy(store, seed=3, cut=0.35) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.endpoint)
        yield proxy
    assert min(proxy.done["cut request"], proxy.done["cut answer"]) > 0


def test_records_are_read_whole_though_connections_break(torn, store):
    for i in range(20):
        record = {"key": str(i), "status": "done", "output": f"{i}.png"}
        put(store, f"recorded/_job/parts/{i:012d}-x.jsonl", json.dumps(record).encode() + b"\n")
    with Records() as records:
        through_outages(lambda: records.load(open_folder("s3://ip2p-test/recorded")), 100, lambda _: None)
        assert [i for i in range(20) if records.status(str(i)) != "done"] == []


def test_a_store_is_not_blamed_for_connections_that_break(torn):
    folder = open_folder("s3://ip2p-test/probed")
    for _ in range(60):
        through_outages(lambda: probe(folder), 100, lambda _: None)


def test_a_manifest_is_read_though_connections_break(torn, said):
    lines = put_lines(torn.upstream, "torn.jsonl", map(line, range(5)))
    given = ("--manifest", lines, "--output", "s3://ip2p-test/x", "--dry-run")
    assert [said(*given)[:2] for _ in range(5)] == [(0, "5 lines, 0 rejected\n")] * 5


def test_keys_that_expire_stop_the_job_for_that_reason_and_it_goes_on_with_good_ones(store, copied, jobs):
    numbers = range(COUNT)
    manifest = put_lines(store, "expired.jsonl", map(line, numbers))
    with S3Proxy(store) as proxy:
        job = jobs.start(proxy.server, "expired", "--manifest", manifest, COPY)
        wait_until(lambda: len(names_below(store, "expired")) >= 10 or not job.runs, EDITED_S, "10 outputs")
        proxy.expired = True
        job.ended(1)
        assert proxy.done["ExpiredToken"] > 0
        said = job.said.strip().splitlines()[-1]
        assert said.startswith("error: ")
        assert "ExpiredToken" in said
        early = outputs_of(store, "expired")
        assert 10 <= len(early) < len(numbers)
        assert lines_of(store, "expired/failed.jsonl") == []
        proxy.expired = False
        summary = jobs.start(proxy.server, "expired", "--manifest", manifest, COPY).ended()
    assert summary["failed"] == summary["this_run"]["failed"] == 0
    check_done(store, "expired", part_of(copied, numbers))
    assert {name: outputs_of(store, "expired")[name] for name in early} == early
    assert {proxy.written[f"expired/p{i:03d}.png"] for i in numbers} == {1}


# ---- whose turn it is, and what kills workers


def test_a_store_that_was_frozen_for_a_while_takes_the_job_from_nobody(weed, monkeypatch):
    for name, value in weed.place.environment().items():
        monkeypatch.setenv(name, value)
    holder, other = (Lease(open_folder("s3://ip2p-test/leased"), held_s=4, renew_s=1) for _ in range(2))
    said: list[str] = []
    holder.acquire(said.append)
    monkeypatch.setattr(Lease, "_is_dead", lambda *_: False)
    waiting = threading.Thread(target=other.acquire, args=(said.append,), daemon=True)
    waiting.start()
    try:
        wait_until(lambda: said, 20, "that the other waits")
        time.sleep(5)
        assert len(said) == 1
        weed.process.send_signal(signal.SIGSTOP)
        time.sleep(8)
        weed.process.send_signal(signal.SIGCONT)
        time.sleep(6)
        assert not holder.lost
        assert said[1:] == []
    finally:
        weed.process.send_signal(signal.SIGCONT)
        holder.release()
    waiting.join(30)
    assert not waiting.is_alive()
    other.release()


def test_of_two_submissions_one_waits_says_so_and_finds_nothing_to_do(store, copied, jobs):
    numbers = range(60)
    manifest = put_lines(store, "both.jsonl", map(line, numbers))
    with S3Proxy(store) as proxy:
        both = [jobs.start(proxy.server, "both", "--manifest", manifest, COPY) for _ in range(2)]
        summaries = [job.ended() for job in both]
    check_done(store, "both", part_of(copied, numbers))
    assert {proxy.written[f"both/p{i:03d}.png"] for i in numbers} == {1}
    waited = ["another submission works on this job (process " in job.said for job in both]
    assert sorted(waited) == [False, True]
    assert [summary["this_run"]["edited"] for summary in summaries] == [0 if one else len(numbers) for one in waited]
    assert [summary["done"] for summary in summaries] == [len(numbers)] * 2


def test_a_picture_that_kills_every_worker_that_reads_it_is_given_up_and_the_others_are_done(
    store, copied, jobs, deaths
):
    note = PngImagePlugin.PngInfo()
    note.add_text("of", "hemlock")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).save(buffer, "PNG", pnginfo=note)
    put(store, "in/poison.png", buffer.getvalue())
    lines = [line(i) for i in range(40)]
    lines.insert(13, line(999, id="poison", image="s3://ip2p-test/in/poison.png"))
    manifest = put_lines(store, "poison.jsonl", lines)
    summary = jobs.start(store, "poison", "--manifest", manifest, COPY).ended(3)
    assert 2 <= len(deaths.read_text()) <= 6
    check_done(store, "poison", part_of(copied, range(40)), failed=["poison"])
    (letter,) = lines_of(store, "poison/failed.jsonl")
    assert letter["error"]["code"] == "worker_died"
    assert summary["this_run"]["reasons"] == {"worker_died": 1}


# ---- what users get wrong


def test_bad_lines_and_bad_pictures_are_named_and_cost_no_other_and_what_came_to_be_there_is_retried(
    store, copied, jobs
):
    white = io.BytesIO()
    Image.new("L", (9000, 9000), 255).save(white, "PNG")
    put(store, "in/large.png", white.getvalue())
    put(store, "in/text.png", b"To whom it may concern")
    lines = [line(i) for i in range(24)]
    missing = (0, 8, 16, 20)  # the first of three chunks, and another
    for number in missing:
        store.client().delete_object(Bucket=store.bucket, Key=f"in/late-{number}.png")
        lines[number] = line(number, image=f"s3://ip2p-test/in/late-{number}.png")
    lines[4] = line(4, image="s3://ip2p-test/in/large.png")
    lines[6] = line(6, image="s3://ip2p-test/in/text.png")
    lines[9] = line(9, image="http://127.0.0.1/in.png")
    lines[11] = line(11, stops=3)
    lines[13] = line(12)
    given = [*lines[:16], '{"id": "broken"', *lines[16:]]  # line 17
    manifest = put_lines(store, "bad.jsonl", given)
    good = [i for i in range(24) if i not in (*missing, 4, 6, 9, 11, 13)]

    job = jobs.start(store, "bad", "--manifest", manifest, COPY)
    summary = job.ended(3)
    assert summary["failed"] == 6
    assert summary["rejected"] == 4
    assert f"warning: {manifest}, line 17: broken JSON" in job.said
    failed = {one["id"]: one["error"]["code"] for one in lines_of(store, "bad/failed.jsonl")}
    absent = {f"p{number:03d}": "not_found" for number in missing}
    assert failed == {**absent, "p004": "picture_too_large", "p006": "unsupported_format"}
    rejected = {one["line"]: one["message"] for one in lines_of(store, "bad/rejected.jsonl")}
    assert rejected[10].startswith("image: nothing is fetched from http:")
    assert rejected[12].startswith("unknown field 'stops'")
    assert rejected[14] == "output 'p012.png' is that of line 13 already"
    assert sorted(rejected) == [10, 12, 14, 17]
    check_done(store, "bad", {f"p{i:03d}.png": copied[f"p{i:03d}.png"] for i in good}, failed)

    for number in missing:
        put(store, f"in/late-{number}.png", picture(number))
    again = jobs.start(store, "bad", "--manifest", manifest, COPY, "--retry-failed").ended(3)
    assert again["this_run"]["edited"] == len(missing)
    failed = {one["id"] for one in lines_of(store, "bad/failed.jsonl")}
    assert failed == {"p004", "p006"}, "what was done at last is told as failed, by its older record"


def test_failed_jsonl_is_a_manifest_again(store, jobs):
    store.client().delete_object(Bucket=store.bucket, Key="in/later.png")
    lines = [line(i) for i in range(12)]
    lines[9] = line(9, image="s3://ip2p-test/in/later.png")
    manifest = put_lines(store, "again.jsonl", lines)
    jobs.start(store, "again", "--manifest", manifest, COPY).ended(3)
    assert [one["id"] for one in lines_of(store, "again/failed.jsonl")] == ["p009"]
    put(store, "in/later.png", picture(9))
    letters = "s3://ip2p-test/again/failed.jsonl"
    summary = jobs.start(store, "again", "--manifest", letters, COPY, "--retry-failed").ended()
    assert summary["this_run"]["edited"] == 1
    whole = jobs.start(store, "again", "--manifest", manifest, COPY).ended()
    assert (whole["done"], whole["this_run"]["edited"]) == (12, 0)


@pytest.fixture
def said(model: Path, store: S3Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the job in this process, as it ends before it needs Ray: exit code, stdout, last line of stderr."""

    def work_on(*_: object) -> None:
        pytest.fail("it was not refused")

    monkeypatch.setattr("jobs.batch_edit.work_on", work_on)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it knows the keys of the last time
        code = main([*arguments, "--ckpt", str(model)])
        out, err = capsys.readouterr()
        return code, out, (err.strip().splitlines() or [""])[-1]

    return run


def test_an_empty_prefix_is_no_error(said):
    given = ("--prefix", "s3://ip2p-test/nothing", "--instruction", "x", "--output", "s3://ip2p-test/of-nothing")
    assert said(*given) == (0, "0 images: nothing to do\n", "")


@pytest.fixture
def small(store: S3Place) -> tuple[str, str]:
    return "--manifest", put_lines(store, "small.jsonl", map(line, range(3)))


@pytest.mark.parametrize("given", [
    ("--manifest", "s3://ip2p-test/small.jsonl", "--output", "s3://no-such-bucket/x"),
    ("--manifest", "s3://no-such-bucket/in.jsonl", "--output", "s3://ip2p-test/x"),
    ("--prefix", "s3://no-such-bucket/in", "--instruction", "x", "--output", "s3://ip2p-test/x"),
], ids=["output", "manifest", "prefix"])  # fmt: skip
def test_a_bucket_that_does_not_exist_is_named_as_such(said, small, store, monkeypatch, given):
    with S3Proxy(store, unknown="/no-such-bucket") as proxy:  # SeaweedFS makes buckets as they are written to
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.endpoint)
        code, _, last = said(*given)
        assert proxy.done["NoSuchBucket"] > 0
    assert code == 1
    assert "s3://no-such-bucket/" in last
    assert "no such bucket; create it or correct the name" in last


def test_wrong_keys_and_missing_rights_are_said(said, small, store, monkeypatch):
    with S3Proxy(store, forbidden="guarded/") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.endpoint)
        code, _, last = said(*small, "--output", "s3://ip2p-test/guarded")
        assert proxy.done["AccessDenied"] > 0
    assert code == 1
    assert last.startswith("error: s3://ip2p-test/guarded/")
    assert "write refused (AccessDenied)" in last
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, _, last = said(*small, "--output", "s3://ip2p-test/x")
    assert code == 1
    assert "refused (SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID" in last


def test_a_store_that_takes_conditions_and_does_not_keep_them_is_refused(said, small, store, monkeypatch):
    with S3Proxy(store, forgetful=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.endpoint)
        code, _, last = said(*small, "--output", "s3://ip2p-test/forgetful")
        assert proxy.done["forgotten condition"] > 0
    assert code == 1
    assert "does not honour conditional writes" in last
    assert names_below(store, "forgetful") == set()


def test_an_output_below_the_prefix_that_is_edited_is_refused(said, store):
    put(store, "photos/a.png", picture(1))
    given = ("--prefix", "s3://ip2p-test/photos", "--instruction", "x")
    for output in ("s3://ip2p-test/photos", "s3://ip2p-test/photos/edited"):
        code, *_ = said(*given, "--output", output, "--dry-run")
        assert code == 1, f"{output}: its edits would be edited by the next run"


def test_an_output_with_the_name_of_a_report_is_refused(said, store):
    lines = [line(0, output="contact_sheet.png"), line(1, output="results.jsonl")]
    manifest = put_lines(store, "reports.jsonl", lines)
    assert said("--manifest", manifest, COPY, "--output", "s3://ip2p-test/x", "--dry-run")[0] == 3


# ---- other settings, other formats, other places


def test_openai_lines_are_answered_and_of_changed_lines_alone_the_edits_are_made_again(store, undisturbed, jobs):
    numbers = range(24)

    def request(number: int) -> dict:
        body = {"model": "any", "image": line(number)["image"], "prompt": "make it night", "num_inference_steps": STEPS}
        return {"custom_id": f"p{number:03d}", "method": "POST", "url": "/v1/images/edits", "body": body}

    asked = [request(i) for i in numbers]
    asked.append({**request(300), "body": {**request(300)["body"], "image": "s3://ip2p-test/in/none.png"}})
    asked.append({**request(301), "body": {**request(301)["body"], "n": 2}})
    jobs.start(store, "openai", "--manifest", put_lines(store, "openai.jsonl", asked)).ended(3)
    answers = {one["custom_id"]: one for one in lines_of(store, "openai/output.jsonl")}
    files = {name: base64.b64decode(one["response"]["body"]["data"][0]["b64_json"]) for name, one in answers.items()}
    assert files == {name.removesuffix(".png"): data for name, data in part_of(undisturbed, numbers).items()}
    errors = {one["custom_id"]: one["error"]["code"] for one in lines_of(store, "openai/error.jsonl")}
    assert errors == {"p300": "not_found", "p301": "invalid_request"}

    before = outputs_of(store, "openai")
    changed = {f"p{i:03d}.png" for i in range(5, 9)}
    lines = [line(i, **({"steps": 2} if f"p{i:03d}.png" in changed else {})) for i in numbers]
    manifest = put_lines(store, "changed.jsonl", lines)
    summary = jobs.start(store, "openai", "--manifest", manifest).ended()
    assert (summary["done"], summary["this_run"]["edited"]) == (len(numbers), len(changed))
    after = outputs_of(store, "openai")
    assert {name for name in after if after[name] != before[name]} == changed
    assert all(after[name][0] != before[name][0] for name in changed)

    summary = jobs.start(store, "openai", "--manifest", manifest).ended()
    assert summary["this_run"]["edited"] == summary["this_run"]["row_evals"] == 0
    assert outputs_of(store, "openai") == after

    lines = put_lines(store, "as-before.jsonl", map(line, numbers))
    jobs.start(store, "openai", "--manifest", lines).ended()
    back = {name: data for name, (data, *_) in outputs_of(store, "openai").items()}
    assert back == part_of(undisturbed, numbers), "told as done are outputs that have been replaced since"


def test_a_server_edits_what_the_job_sends_it(store, undisturbed, jobs, model, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "ip2p", "serve", "--port", url.rpartition(":")[2], "--model", f"tiny={model}"]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen([*command, "--threads", "1"], cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:

        def ready() -> bool:
            with contextlib.suppress(requests.RequestException):
                return requests.get(f"{url}/readyz", timeout=5).status_code == 200
            return False

        wait_until(ready, EDITED_S, "a server that is ready")
        manifest = put_lines(store, "served.jsonl", map(line, range(24)))
        jobs.start(store, "served", "--manifest", manifest, "--via-serve", url).ended()
    finally:
        server.terminate()
        server.wait(30)
    made = outputs_of(store, "served")
    expected = part_of(undisturbed, range(24))
    assert set(made) == set(expected)
    for name, data in expected.items():
        far = np.abs(decode_image(made[name][0]).astype(int) - decode_image(data)).max()
        assert far <= 1, name
