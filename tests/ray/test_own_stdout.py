"""What a job prints is read by programs: nothing that Ray prints comes in between or after it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.ray.processes import ROOT, environment

pytestmark = [pytest.mark.ray]

# Two workers die, so that Ray holds the second one's news back as a repetition, until the driver leaves.
JOB = """
import json, os, sys, threading
from pathlib import Path
from jobs._ray import connect

connect()
import ray

@ray.remote(max_retries=1)
def dies_once(note):
    if not Path(note).exists():
        Path(note).touch()
        os._exit(1)
    return 1

done = sum(ray.get([dies_once.remote(note) for note in sys.argv[1:]]))
aside = threading.Thread(target=print, args=("from another thread",))
aside.start()
aside.join()
print(json.dumps({"done": done}))
"""


def test_dying_workers_leave_stdout_to_the_job(tmp_path):
    notes = [str(tmp_path / name) for name in ("one", "two")]
    ran = subprocess.run(
        [sys.executable, "-c", JOB, *notes], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [{"done": 2}]
    assert "A worker died" in ran.stderr  # or nothing was tried
    assert "from another thread" in ran.stderr
