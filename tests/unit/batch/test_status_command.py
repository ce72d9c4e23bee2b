"""``ip2p batch-edit status``: what it says of a batch that runs, has ended, was stopped, or was never begun."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ip2p.batch.lease import Lease
from ip2p.batch.places import LEASE, STATUS, SUMMARY
from ip2p.cli import main
from ip2p.storage import Folder, LocalFolder

COUNTS = {"lines": 12, "done": 5, "failed": 2, "rejected": 1, "waiting": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return LocalFolder(tmp_path)


def write_status(folder: Folder, ago_s: float = 3, **more: object) -> None:
    status = {**COUNTS, "eta_s": 90, "workers": 3, "reasons": {}, "at": int(time.time() - ago_s), **more}
    folder.write(STATUS, json.dumps(status).encode())


def write_lease(folder: Folder, **changes: object) -> None:
    there = {"host": "elsewhere", "boot": "b", "pid": 17, "name": "n", "fence": 2, "renewals": 1, "held_s": 20.0}
    folder.write(LEASE, json.dumps({**there, "released": False, **changes}).encode())


def said(folder: Folder, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["batch-edit", "status", folder.uri, *flags]) == 0
    return capsys.readouterr().out


def test_a_batch_that_runs_says_who_works_on_it_and_how_far_it_is(folder, capsys):
    write_lease(folder)
    write_status(folder)
    lines = said(folder, capsys).splitlines()
    assert lines[0] == "running: process 17 on elsewhere, submission 2"
    assert lines[1].startswith("5 of 12 done, 2 failed, 1 rejected, 4 waiting, 3 workers; written ")
    assert lines[2:] == ["about 90 s left"]


def test_a_batch_that_has_just_begun_has_no_counts_yet(folder, capsys):
    write_lease(folder)
    assert said(folder, capsys).splitlines() == ["running: process 17 on elsewhere, submission 2"]


def test_a_batch_that_runs_and_is_silent_may_have_died(folder, capsys):
    write_lease(folder)
    write_status(folder, ago_s=50)
    assert "may have died" not in said(folder, capsys)
    write_status(folder, ago_s=70)
    assert "it may have died: run the same command again to go on" in said(folder, capsys)


def test_a_batch_that_was_stopped_is_not_finished(folder, capsys):
    write_lease(folder, released=True)
    write_status(folder, ago_s=500, eta_s=None)
    lines = said(folder, capsys).splitlines()
    assert lines[0].startswith("stopped: process 17")
    assert "written 500 s ago" in lines[1] or "written 501 s ago" in lines[1]
    assert len(lines) == 2


def test_a_batch_that_is_finished_says_so(folder, capsys):
    write_lease(folder, released=True)
    write_status(folder, done=9, waiting=0, eta_s=0, workers=0)
    folder.write(SUMMARY, json.dumps({**COUNTS, "done": 9, "waiting": 0, "submission": 2}).encode())
    lines = said(folder, capsys).splitlines()
    assert lines[0].startswith("finished: process 17")
    assert len(lines) == 2


def test_a_finished_batch_that_is_taken_up_again_runs(folder, capsys):
    folder.write(SUMMARY, b"{}")
    write_lease(folder, fence=3)
    assert said(folder, capsys).startswith("running: process 17 on elsewhere, submission 3")


def test_a_finished_batch_whose_next_submission_was_stopped_is_stopped(folder, capsys):
    folder.write(SUMMARY, json.dumps({**COUNTS, "waiting": 0, "submission": 1}).encode())
    write_lease(folder, fence=2, released=True)
    write_status(folder)
    assert said(folder, capsys).startswith("stopped")


def test_a_program_gets_the_same_as_one_object(folder, capsys):
    write_lease(folder)
    write_status(folder)
    told = json.loads(said(folder, capsys, "--json"))
    assert {name: told[name] for name in COUNTS} == COUNTS
    assert (told["state"], told["host"], told["pid"]) == ("running", "elsewhere", 17)
    assert (told["eta_s"], told["workers"]) == (90, 3)
    assert 3 <= told["silent_s"] < 60


def test_a_program_gets_no_counts_where_there_are_none(folder, capsys):
    write_lease(folder)
    told = json.loads(said(folder, capsys, "--json"))
    assert told == {"state": "running", "host": "elsewhere", "pid": 17, "silent_s": None}


def test_a_lease_as_submissions_write_it_is_understood(folder, capsys):
    lease = Lease(folder)
    lease.acquire(print)
    assert said(folder, capsys).startswith("running: process ")
    lease.release()
    assert said(folder, capsys).startswith("stopped: process ")


@pytest.mark.service
def test_a_batch_on_s3_is_asked_in_the_same_way(s3_uri, capsys):
    from ip2p.storage import open_folder

    write_lease(open_folder(s3_uri), released=True)
    assert main(["batch-edit", "status", s3_uri]) == 0
    assert capsys.readouterr().out.startswith("stopped: process 17")


def test_where_there_is_no_batch_that_is_said(folder, capsys):
    folder.write(SUMMARY, b"{}")
    assert main(["batch-edit", "status", folder.uri]) == 1
    said = capsys.readouterr().err
    assert f"{folder.uri}: no batch was begun here; name the --output of jobs/batch_edit.py" in said
