"""``python -m ip2p serve`` as a user starts it: a process, a port, curl, signals."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import EDITS, PICTURE, ROOT, Command, commanded, far_apart, files_in, picture_in, until

from ip2p.images import carried_text, decode_image

pytestmark = pytest.mark.service


def curl(command: Command, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    key = f"Authorization: Bearer {command.key}"
    line = ["curl", "--silent", "--show-error", "--fail-with-body", "-H", key, *arguments]
    return subprocess.run(line, capture_output=True, timeout=60)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    (tmp_path / "in.png").write_bytes(PICTURE)
    return tmp_path / "in.png"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_json(command: Command, picture: Path) -> None:
    fields = ["-F", f"image=@{picture}", "-F", "prompt=make it night", "-F", "seed=1", "-F", "num_inference_steps=3"]
    done = curl(command, *fields, command.url + EDITS)
    assert done.returncode == 0, done.stdout
    (one,) = json.loads(done.stdout)["data"]
    assert far_apart(decode_image(base64.b64decode(one["b64_json"])), picture_in(command.edit())) <= 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_picture_as_the_help_says(command: Command, picture: Path) -> None:
    fields = ["-F", f"image=@{picture}", "-F", "prompt=make it night", "-H", "Accept: image/png"]
    output = picture.with_name("out.png")
    done = curl(command, *fields, "-o", str(output), command.url + EDITS)
    assert done.returncode == 0, done.stderr
    assert json.loads(carried_text(output.read_bytes()))["steps"] == 20
    assert decode_image(output.read_bytes()).shape == (16, 16, 3)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_told_what_is_wrong(command: Command, picture: Path) -> None:
    done = curl(command, "-F", f"image=@{picture}", command.url + EDITS)
    assert done.returncode == 22
    assert json.loads(done.stdout)["error"]["param"] == "prompt"


def test_a_large_photo_goes_through_and_a_body_beyond_the_limit_does_not(command: Command) -> None:
    assert command.edit(PICTURE + bytes(15 * 2**20), num_inference_steps=1).status_code == 200
    assert command.edit(PICTURE + bytes(21 * 2**20)).status_code == 413


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_once_its_edits_are_done(
    edit_folder: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    log = tmp_path / "log.txt"
    with commanded(edit_folder, log, "--max-steps", "500") as own, ThreadPoolExecutor(1) as person:
        assert own.get("/readyz").json() == {"status": "READY"}
        edit = person.submit(own.edit, num_inference_steps=150)
        until(lambda: own.metric("ip2p_row_evals_total") > 6, "the edit has begun")
        own.process.send_signal(sent)
        assert files_in(edit.result(60))
        assert own.process.wait(20) == 0
        assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--keys", "nowhere.txt"], "nowhere.txt: the keys cannot be read"),
        (["--model", "no-equals-sign"], "--model no-equals-sign: expected NAME=DIR"),
        (["--model", "=folder"], "expected NAME=DIR"),
        (["--check", "nowhere:function"], "--check nowhere:function: expected module:function"),
        (["--check", "json"], "--check json: expected module:function"),
        (["--check", "json:decoder"], "decoder cannot be called"),
    ],
)
def test_flags_that_cannot_work_are_said_in_one_line(flags: list[str], problem: str, capsys) -> None:
    from ip2p.cli import main

    assert main(["serve", "--port", "0", *flags]) == 1
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


def test_help_answers_without_loading_torch() -> None:
    program = (
        "import sys; from ip2p.cli import main\ntry: main(['serve', '--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("False"), done.stderr
    assert "/readyz" in done.stdout
