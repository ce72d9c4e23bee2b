"""Progress lines, and how a shard travels between workers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

from ip2p.errors import CheckpointError, StorageError
from jobs._progress import Progress
from jobs._ray import FailedShard, loaded, on_shard, pack, unpack


def test_json_progress_counts_what_an_earlier_run_did(capsys):
    progress = Progress(10, "prompts", skipped=4, as_json=True)
    progress.tell(2, kept_pairs=3)
    line = json.loads(capsys.readouterr().err)
    assert (line["prompts"], line["total"], line["kept_pairs"]) == (6, 10, 3)
    assert line["eta_s"] >= 0


def test_eta_is_what_is_left_at_the_rate_so_far():
    progress = Progress(10, "prompts", skipped=4, quiet=True)
    assert progress.eta_s() is None
    progress.tell(2)
    progress.started -= 20
    assert progress.eta_s() == pytest.approx(40, rel=0.05)


def test_quiet_says_nothing(capsys):
    progress = Progress(2, "prompts", quiet=True)
    with progress:
        progress.say("pools: one painter")
        progress.tell(2, kept_pairs=1)
    assert capsys.readouterr().err == ""


def test_quiet_still_names_failed_shards(capsys):
    Progress(2, "prompts", quiet=True).say("error: shard part-00001-x: gone")
    assert capsys.readouterr().err == "error: shard part-00001-x: gone\n"


def test_a_remark_is_a_line_of_its_own_in_json(capsys):
    Progress(2, "prompts", as_json=True).say("pools: one painter")
    assert json.loads(capsys.readouterr().err) == {"note": "pools: one painter"}


def test_there_is_a_sign_of_life_while_nothing_gets_done(capsys):
    with Progress(7, "prompts", skipped=1, every_s=0.02):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert set(lines) == {"1/7 prompts, ? left"}


def test_without_a_terminal_there_is_a_line_a_minute_and_one_at_the_end(capsys):
    progress = Progress(3, "prompts")
    progress.tell(1, kept_pairs=1)
    assert capsys.readouterr().err == ""
    progress.told -= 61
    progress.tell(1, kept_pairs=2)
    assert capsys.readouterr().err.startswith("2/3 prompts, kept pairs 2, ")
    progress.tell(1, kept_pairs=2)
    assert capsys.readouterr().err == "3/3 prompts, kept pairs 2, 0:00 left\n"


def test_an_error_of_ours_travels_past_later_stages_and_names_the_shard():
    row = {"name": "part-00007-x", "payload": pack({"a": 1})}

    def fails(batch):
        raise StorageError("the disk is full")

    failed = on_shard(row, fails)
    after = on_shard(failed, lambda batch: pytest.fail("a later stage worked on a failed shard"))
    error = unpack(after["payload"])
    assert isinstance(error, StorageError)
    assert str(error) == "shard part-00007-x: the disk is full"


def test_any_other_error_fails_the_shard_and_says_where_it_happened(capsys):
    row = on_shard({"name": "part-00007-x", "payload": pack({})}, lambda batch: 1 / 0)
    failed = unpack(row["payload"])
    assert isinstance(failed, FailedShard)
    assert failed.name == "part-00007-x"
    assert re.fullmatch(
        r"ZeroDivisionError: division by zero \(test_progress_and_transport.py, line \d+, in <lambda>\)", failed.why
    )
    assert "Traceback" in capsys.readouterr().err
    later = on_shard(row, lambda batch: pytest.fail("a later stage worked on a failed shard"))
    assert unpack(later["payload"]) == failed


def test_a_device_fault_ends_the_process_that_had_it():
    code = """
from ip2p.errors import DeviceError
from jobs._ray import on_shard, pack
def work(batch):
    raise DeviceError("cuda:0 failed")
on_shard({"name": "part-00007-x", "payload": pack({})}, work)
print("still alive")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "cuda:0 failed" in ended.stderr


def test_a_model_that_does_not_load_is_reported_by_the_first_shard():
    def load():
        raise CheckpointError("cut short")

    thing = loaded(load)
    row = on_shard({"name": "part-00000-x", "payload": pack({})}, lambda batch: thing()(batch))
    assert str(unpack(row["payload"])) == "shard part-00000-x: cut short"


def test_any_other_error_of_loading_fails_the_shards_that_needed_the_model():
    thing = loaded(lambda: 1 / 0)
    row = on_shard({"name": "part-00000-x", "payload": pack({})}, lambda batch: thing()(batch))
    assert unpack(row["payload"]).why.startswith("ZeroDivisionError: division by zero (")


def test_a_model_is_loaded_once():
    count = []
    thing = loaded(lambda: count.append(1) or "model")
    assert (thing(), thing()) == ("model", "model")
    assert count == [1]
