"""What jobs/batch_edit.py says to bad input, before any cluster starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ip2p.cli import main as ip2p_main
from ip2p.storage import LocalFolder
from jobs import batch_edit
from tests.job_errors import one_error

pytestmark = pytest.mark.usefixtures("no_cluster")

ROW = {"image": "a.png", "instruction": "make it night"}


@pytest.fixture
def job(tmp_path, capsys):
    """Runs the job without a model on ``rows``; returns exit code, stdout and stderr."""

    def run(*more: str, rows: tuple[object, ...] = (ROW,)) -> tuple[int, str, str]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "m.jsonl").write_text("".join(f"{line}\n" for line in lines))
        given = [] if "--prefix" in more else ["--manifest", str(tmp_path / "m.jsonl")]
        code = batch_edit.main([*given, "--copy", "--dry-run", "--output", str(tmp_path / "out"), *more])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prefix", "in"], "--prefix needs --instruction"),
        (["--prefix", "in", "--instruction", " "], "no instruction; "),
        (["--instruction", "x" * 1001], "instruction has 1001 characters, the limit is 1000"),
        (["--instruction", "caf\udce9"], "instruction is not valid UTF-8"),
        (["--set", "step=3"], "--set step=3: expected FIELD=VALUE with one of steps, "),
        (["--set", "steps"], "--set steps: expected FIELD=VALUE"),
        (["--set", "steps=0"], "steps must be a whole number from 1 to 1000"),
        (["--rows-per-call", "2"], "--rows-per-call is at least 3"),
        (["--chunk", "0"], "--chunk at least 1"),
        (["--via-serve", "http://localhost:8000"], "--via-serve and --copy exclude each other"),
    ],
)
def test_options_that_cannot_be_used_are_refused_with_what_is_wanted(job, more, said):
    code, _, error = job(*more)
    assert code == 1
    assert said in one_error(error)


def test_an_address_that_is_none_is_refused(tmp_path, capsys):
    given = ["--manifest", "m.jsonl", "--output", str(tmp_path), "--via-serve", "localhost:8000", "--dry-run"]
    assert batch_edit.main(given) == 1
    assert "'localhost:8000' is no address of a server; write http://HOST:PORT" in one_error(capsys.readouterr().err)


def test_results_are_not_to_be_edited_again(job, tmp_path):
    code, _, error = job("--prefix", str(tmp_path), "--instruction", "make it night")
    assert code == 1
    assert "--output lies below --prefix" in one_error(error)


def test_lines_that_cannot_be_used_are_named_and_counted(job, tmp_path):
    code, said, error = job("--json", rows=(ROW, "broken", {"image": "b.png"}))
    assert code == 3
    assert json.loads(said) == {"lines": 3, "done": 0, "failed": 0, "rejected": 2, "waiting": 1}
    assert [line.partition("m.jsonl, ")[2][:6] for line in error.splitlines()] == ["line 2", "line 3"]
    assert not (tmp_path / "out").exists()


def test_one_bad_line_stops_a_strict_job(job):
    code, _, error = job("--strict", rows=(ROW, "broken"))
    assert code == 1
    assert "1 lines cannot be used; mend them, or leave out --strict" in error.splitlines()[-1]


def test_an_empty_manifest_is_refused_and_an_empty_prefix_is_not(job, tmp_path):
    assert "the file is empty; it needs at least one line" in one_error(job(rows=())[2])
    code, said, _ = job("--prefix", str(tmp_path / "in"), "--instruction", "make it night")
    assert (code, said) == (0, "0 lines, 0 rejected\n")


def test_a_folder_above_is_a_place_like_any_other(job, tmp_path, monkeypatch):
    LocalFolder(tmp_path / "in").write("a.png", b"")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert job("--prefix", "../in", "--instruction", "make it night")[1] == "1 lines, 0 rejected\n"
    assert batch_edit.main(["--manifest", "../m.jsonl", "--copy", "--dry-run", "--output", "out"]) == 0
    assert not Path("out").exists()


def test_a_submission_that_finds_nothing_to_do_finishes_without_a_cluster(tmp_path, capsys):
    given = ["--prefix", str(tmp_path / "in"), "--instruction", "make it night", "--copy"]
    for submission in (1, 2):
        assert batch_edit.main([*given, "--output", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out == "0 images: nothing to do\n"
        assert ip2p_main(["batch-edit", "status", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().out.splitlines()[0]
        assert said.startswith("finished: ")
        assert said.endswith(f"submission {submission}")
