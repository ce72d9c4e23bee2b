"""Weights arrive whole or not at all: from servers that break off, stall, lie and send other bytes, under kills too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer
from safetensors.numpy import save_file

from ip2p.cli import main
from ip2p.errors import CheckpointError, StorageError
from ip2p.models import fetching, weight_sources
from ip2p.models.checkpoint import verify_manifest, write_manifest
from ip2p.models.fetching import fetch, mirror
from ip2p.models.weight_sources import open_source

UNET = "unet/model.safetensors"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of two weight files of 400 kB and a config, with its manifest."""
    folder = tmp_path / "source"
    random_ = np.random.default_rng(0)
    for name in (UNET, "vae/model.safetensors"):
        (folder / name).parent.mkdir(parents=True)
        save_file({"a": random_.standard_normal((100, 1000)).astype(np.float32)}, folder / name)
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    return folder


@pytest.fixture
def server(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(weight_sources, "SILENT_S", 0.5)
    made = FaultyServer(weights)
    yield made
    made.close()


def same(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert names == sorted(
        path.relative_to(other) for path in other.rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    verify_manifest(other)


def fetched(server: FaultyServer, target: Path) -> bool:
    return fetch(open_source(server.uri), target)


def test_a_folder_on_a_web_server_arrives_whole_and_is_not_fetched_twice(server, weights, tmp_path) -> None:
    told: list[int] = []
    assert fetch(open_source(server.uri), tmp_path / "here", told.append)
    same(weights, tmp_path / "here")
    assert sum(told) == sum(
        path.stat().st_size for path in weights.rglob("*") if path.name != "manifest.json" and path.is_file()
    )
    before = dict(server.sent)
    assert not fetched(server, tmp_path / "here")
    assert dict(server.sent) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".here.lock", "here", "source"]


@pytest.mark.parametrize("fault", ["break off", "stall"])
def test_a_server_that_breaks_off_or_stalls_is_asked_for_the_rest_alone(server, weights, tmp_path, fault) -> None:
    server.strike(fault, UNET, 3)
    fetched(server, tmp_path / "here")
    same(weights, tmp_path / "here")
    assert server.struck == 3
    ranges = [asked for name, asked in server.asked if name == UNET]
    assert ranges[0] == ""
    assert all(asked.startswith("bytes=") for asked in ranges[1:])
    assert server.sent[UNET] <= (weights / UNET).stat().st_size + 2**16


def test_a_busy_server_is_asked_again(server, weights, tmp_path) -> None:
    server.strike("busy", UNET, 4)
    fetched(server, tmp_path / "here")
    same(weights, tmp_path / "here")
    assert server.struck == 4


def test_bytes_that_are_wrong_once_are_fetched_again_and_twice_are_refused(server, weights, tmp_path) -> None:
    server.strike("other bytes", UNET, 1)
    fetched(server, tmp_path / "once")
    same(weights, tmp_path / "once")
    server.strike("other bytes", UNET, 2)
    with pytest.raises(CheckpointError, match=r"found sha256 .* expected .*; the source is damaged"):
        fetched(server, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("fault", ["shorter", "longer", "page"])
def test_a_server_that_lies_about_the_size_is_refused(server, tmp_path, fault) -> None:
    server.strike(fault, UNET, 99)
    with pytest.raises(CheckpointError, match=r"the server says \d+ bytes, expected \d+"):
        fetched(server, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_file_that_changed_on_the_server_is_never_joined_with_what_came_before(server, weights, tmp_path) -> None:
    server.strike("break off", UNET, 1)
    asked = 0

    def changing(count: int) -> None:
        nonlocal asked
        if server.struck and not asked:
            asked = 1
            server.etag = '"two"'

    fetch(open_source(server.uri), tmp_path / "here", changing)
    same(weights, tmp_path / "here")
    assert server.sent[UNET] > (weights / UNET).stat().st_size  # from the beginning again


def test_a_server_that_never_answers_is_given_up_with_what_came_kept(server, weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fetching, "TRIES", 3)
    server.strike("busy", UNET, 99)
    with pytest.raises(StorageError, match="gave up after 3 tries, run the same command to go on"):
        fetched(server, tmp_path / "here")
    assert (tmp_path / ".here.partial" / "vae" / "model.safetensors").exists()
    server.strike("", "")
    vae = server.sent["vae/model.safetensors"]
    fetched(server, tmp_path / "here")
    same(weights, tmp_path / "here")
    assert server.sent["vae/model.safetensors"] == vae


def test_a_manifest_that_leads_out_of_the_folder_is_refused(server, weights, tmp_path) -> None:
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["files"]["../../evil.safetensors"] = manifest["files"][UNET]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lies outside of the folder"):
        fetched(server, tmp_path / "here")


def test_a_page_in_place_of_a_manifest_says_what_was_found(server, tmp_path) -> None:
    server.strike("page", "manifest.json", 9)
    with pytest.raises(CheckpointError, match="found '<html>please log in</html>', expected a manifest"):
        fetched(server, tmp_path / "here")


def test_pickles_are_refused_before_anything_is_fetched(weights, tmp_path) -> None:
    (weights / "model.ckpt").write_bytes(b"x")
    write_manifest(weights)
    with pytest.raises(CheckpointError, match="pickled and can run code; convert it first"):
        fetch(open_source(str(weights)), tmp_path / "here")


def test_weights_with_nan_are_refused_although_every_byte_is_as_promised(weights, tmp_path) -> None:
    save_file({"a": np.array([1.0, np.nan], np.float32)}, weights / UNET)
    write_manifest(weights)
    with pytest.raises(CheckpointError, match="a holds NaN or Inf"):
        fetch(open_source(str(weights)), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_folder_without_manifest_is_taken_if_its_weights_are_whole(weights, tmp_path) -> None:
    (weights / "manifest.json").unlink()
    fetch(open_source(str(weights)), tmp_path / "here")
    same(weights, tmp_path / "here")
    whole = (weights / UNET).read_bytes()
    (weights / UNET).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"found \d+ bytes, expected \d+"):
        fetch(open_source(str(weights)), tmp_path / "cut")
    (weights / UNET).write_bytes(b"<html>please log in and accept the licence first</html>" * 100)
    with pytest.raises(CheckpointError, match="header is unreadable"):
        fetch(open_source(str(weights)), tmp_path / "page")


def test_a_target_that_holds_something_else_is_left_alone(weights, tmp_path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds something that was not fetched"):
        fetch(open_source(str(weights)), tmp_path / "here")
    assert (tmp_path / "here" / "mine.txt").read_text() == "mine"


def test_a_fetched_folder_that_was_damaged_is_named_and_not_used(weights, tmp_path) -> None:
    fetch(open_source(str(weights)), tmp_path / "here")
    data = bytearray((tmp_path / "here" / UNET).read_bytes())
    data[-1] ^= 1
    (tmp_path / "here" / UNET).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"delete .* and fetch it again"):
        fetch(open_source(str(weights)), tmp_path / "here")


def test_too_little_room_is_said_before_the_first_byte(server, tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"are free, .* more are needed"):
        fetched(server, tmp_path / "here")
    assert set(server.sent) == {"manifest.json"}


def test_two_fetchers_at_once_download_once_and_the_second_says_that_it_waits(server, weights, tmp_path) -> None:
    server.slow_s = 0.05
    said: list[str] = []
    answers: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(fetch(open_source(server.uri), tmp_path / "here", say=said.append))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False, True]
    assert said == [f"{tmp_path / 'here'}: another process is fetching it; waiting for it"]
    assert server.sent[UNET] == (weights / UNET).stat().st_size


def test_a_kill_at_any_moment_leaves_nothing_that_loads_and_the_next_fetch_goes_on(server, weights, tmp_path) -> None:
    server.slow_s = 0.03
    target, sizes = tmp_path / "here", []
    program = (
        "from pathlib import Path; from ip2p.models.fetching import fetch; "
        "from ip2p.models.weight_sources import open_source; import sys; print('go', flush=True); "
        "fetch(open_source(sys.argv[1]), Path(sys.argv[2]))"
    )
    draw = random.Random(3)
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", program, server.uri, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if target.exists():
            same(weights, target)
        else:
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.part")))
    assert len(sizes) >= 3, "the kills came too late to prove anything"
    server.slow_s = 0.0
    fetched(server, target)
    same(weights, target)


def test_mirror_puts_the_manifest_last_and_copies_nothing_twice(weights, tmp_path) -> None:
    assert mirror(weights, str(tmp_path / "mirror")) == 3
    assert mirror(weights, str(tmp_path / "mirror")) == 0
    fetch(open_source(str(tmp_path / "mirror")), tmp_path / "here")
    same(weights, tmp_path / "here")


@pytest.mark.service
def test_weights_go_to_s3_and_come_back_whole_after_breaking_off(s3_server, weights, tmp_path, monkeypatch) -> None:
    place = f"s3://{s3_server.bucket}/weights/model"
    assert main(["weights", "mirror", str(weights), place]) == 0
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    pieces_of, broken = weight_sources._pieces_of, []

    def breaking(file, where):
        for number, piece in enumerate(pieces_of(file, where)):
            yield piece[: len(piece) // 2]
            if not broken and number == 0 and len(piece) > 1000:
                broken.append(where)
                raise weight_sources.BrokenOffError("cut")
            yield piece[len(piece) // 2 :]

    monkeypatch.setattr(weight_sources, "_pieces_of", breaking)
    assert main(["weights", "fetch", place, str(tmp_path / "here"), "--quiet"]) == 0
    assert broken
    same(weights, tmp_path / "here")
    assert main(["weights", "verify", str(tmp_path / "here")]) == 0
