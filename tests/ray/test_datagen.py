"""The datagen job on a real local Ray, with the shipped family: same rows as a plain loop, and killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip2p.config import load_recipe
from ip2p.dataset.run_folder import verify
from ip2p.dataset.shards import plan_shards
from ip2p.postcards.captions import postcard_captions
from ip2p.storage import open_folder
from ip2p.triplets.captions import as_batch
from jobs._ray import CommitShard, PaintShard, WriteShard, pack
from tests.ray.processes import ROOT, actor_of, environment, kill, wait_until

SETTINGS = ["pairs.candidates=2", "pairs.steps=6", "output.prompts_per_shard=3", "filter.min_direction=0",
            "filter.min_image=0", "filter.min_original=0", "filter.min_edited=0"]  # fmt: skip
PROMPTS = 60

pytestmark = [pytest.mark.ray, pytest.mark.weights]


def command(output: Path, *more: str) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return [sys.executable, str(ROOT / "jobs" / "datagen.py"), "--recipe", "postcard", "--output", str(output),
            "--prompts", str(PROMPTS), *sets, "--json", *more]  # fmt: skip


def made_bytes(output: Path) -> dict[str, bytes]:
    """Everything a run leaves but its summary, which holds seconds."""
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(p.relative_to(output)): p.read_bytes() for p in files if p.name != "summary.json"}


def plain_loop(output: Path) -> None:
    """The same stages without Ray, shard after shard in reverse order, and without summary files."""
    recipe = load_recipe("postcard", SETTINGS)
    stages = [WriteShard(recipe), PaintShard(recipe), CommitShard(str(output), recipe, run_id(recipe))]
    for shard in reversed(plan_shards(postcard_captions(PROMPTS).rows, recipe)):
        row = {"name": shard.name, "payload": pack(as_batch(shard.rows))}
        for stage in stages:
            row = stage(row)


def run_id(recipe):
    from ip2p.dataset.shards import run_id_of

    return run_id_of(recipe)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """Files of a run that nothing disturbed, made without Ray."""
    output = tmp_path_factory.mktemp("plain") / "run"
    plain_loop(output)
    return made_bytes(output)


@pytest.mark.timeout(900)
def test_killed_actors_and_a_killed_driver_leave_the_bytes_of_an_undisturbed_run(tmp_path, undisturbed):
    output = tmp_path / "run"

    def shards_done() -> int:
        return len(list((output / "stats").glob("*.json"))) if (output / "stats").exists() else 0

    driver = subprocess.Popen(command(output), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    # Ray's titles say what an actor is at: ".submit" is the middle of a shard.
    kill(wait_until(lambda: actor_of(driver, "Map(WriteShard)).submit"), 240, "an LM actor at work"))
    wait_until(lambda: shards_done() >= 1, 240, "a first shard")
    kill(wait_until(lambda: actor_of(driver, "Map(PaintShard)).submit"), 60, "a painter at work"))
    before = wait_until(lambda: shards_done() >= 4 and shards_done(), 300, "shards after the actors were killed")
    assert before < PROMPTS // 3, "the run was over before the driver could be killed"
    finished_early = {p.name: p.stat().st_mtime_ns for p in (output / "stats").iterdir()}
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait(30) == -signal.SIGKILL

    again = subprocess.run(command(output), env=environment(), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr[-2000:]
    # Ray's C++ core writes to stderr too.
    lines = [json.loads(line) for line in again.stderr.splitlines() if line.startswith("{")]
    first_line = next(line for line in lines if "prompts" in line)
    assert first_line["prompts"] > 3 * len(finished_early) - 1, "finished prompts were not counted as done"
    for name, when in finished_early.items():
        assert (output / "stats" / name).stat().st_mtime_ns == when, f"{name} was painted again"
    made = made_bytes(output)
    for name, data in undisturbed.items():
        assert made[name] == data, f"{name} differs from the undisturbed run"
    extra = set(made) - set(undisturbed)
    assert extra == {"recipe.json", "weights.json", "manifest.json", "contact_sheet.png"}
    assert verify(open_folder(str(output))) == []

    summary = json.loads((output / "summary.json").read_text())
    assert summary["prompts"] == PROMPTS
    assert summary["kept_pairs"] > 0
    assert sum(summary["prompts_by_reason"].values()) == PROMPTS

    # A third time there is nothing to do, no Ray starts, and nothing changes.
    started = time.monotonic()
    third = subprocess.run(command(output), env=environment(), capture_output=True, text=True, timeout=120)
    assert third.returncode == 0
    assert made_bytes(output) == made
    assert json.loads(third.stdout.splitlines()[-1])["row_evals"] == summary["row_evals"]
    assert time.monotonic() - started < 60
