"""Shards that fail in ways nobody foresaw: the others are done, and each failed one is named with its reason."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from ip2p.config import Placement, load_recipe
from ip2p.dataset.shards import WEIGHTS, finished_shards, plan_shards, run_id_of
from ip2p.errors import JobError, StorageError
from ip2p.seeds import stable_id
from ip2p.storage import open_folder
from ip2p.triplets.captions import CaptionRow
from jobs._ray import WORKER_DEATHS, FailedShard, on_shard, run_shards

pytestmark = [pytest.mark.ray]


class Writes:
    """Takes any caption as its own edit."""

    def __init__(self, recipe, device):
        pass

    def __call__(self, row):
        def written(batch):
            empty = np.array([""] * len(batch["prompt_id"]), object)
            return {**batch, "status": empty, "reason": empty, "error": empty}

        return on_shard(row, written)


class Paints:
    """Paints nothing; a caption may ask it to die, to break or to fail."""

    def __init__(self, recipe, device, threads):
        pass

    def __call__(self, row):
        return on_shard(row, painted)


def painted(batch):
    for caption in batch["caption"]:
        if caption.startswith("die"):
            with Path(caption.split()[1]).open("a") as deaths:
                deaths.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if caption.startswith("break"):
            raise ZeroDivisionError("a bug")
        if caption.startswith("full"):
            raise StorageError("the disk is full")
    count = len(batch["prompt_id"])
    none = np.empty(count, object)
    for place in range(count):
        none[place] = []
    columns = {"status": np.array(["exhausted"] * count, object), "candidates": none, "pairs": none}
    return {**batch, **columns, "row_evals": np.zeros(count, np.int64), **dict.fromkeys(WEIGHTS, "none")}


class Unbuildable:
    def __init__(self, recipe, device, threads):
        raise ZeroDivisionError("no such thing")

    def __call__(self, row):
        return row


@pytest.fixture(autouse=True)
def by_value(ray_local):
    """Workers cannot import a test module."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def run(tmp_path: Path, captions: list[str], painter: type = Paints):
    recipe = load_recipe("postcard", ["output.prompts_per_shard=1"])
    rows = [CaptionRow(i, stable_id(caption), i + 1, caption) for i, caption in enumerate(captions)]
    placement = Placement(lm_cpus=0.1, painter_cpus=0.5)
    shards = plan_shards(rows, recipe)
    output = str(tmp_path / "run")
    return shards, run_shards(shards, recipe, placement, output, run_id_of(recipe), (Writes, painter))


def test_a_shard_that_kills_its_workers_is_given_up_and_named_and_the_others_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs._ray.WINDOW", 5)  # two windows: what follows the bad one is worked on too
    deaths = tmp_path / "deaths"
    shards, outcome = run(tmp_path, ["a red boat", f"die {deaths}", *(f"boat {i}" for i in range(6))])
    done = list(outcome)
    failed = [one for one in done if isinstance(one, FailedShard)]
    why = f"its worker died {WORKER_DEATHS} times (out of memory, or killed)"
    assert failed == [FailedShard(shards[1].name, why, worker_died=True)]
    assert len(deaths.read_text()) == WORKER_DEATHS
    assert finished_shards(open_folder(str(tmp_path / "run"))) == {s.name for s in shards} - {shards[1].name}


def test_a_bug_fails_its_shard_alone_and_says_where(tmp_path):
    shards, outcome = run(tmp_path, ["a red boat", "break", "a blue boat"])
    failed = [one for one in outcome if isinstance(one, FailedShard)]
    assert [one.name for one in failed] == [shards[1].name]
    assert failed[0].why.startswith("ZeroDivisionError: a bug (")
    assert finished_shards(open_folder(str(tmp_path / "run"))) == {shards[0].name, shards[2].name}


def test_an_error_with_a_remedy_stops_the_job_as_it_was_raised(tmp_path):
    shards, outcome = run(tmp_path, ["full"])
    with pytest.raises(StorageError, match=f"^shard {shards[0].name}: the disk is full$"):
        list(outcome)


def test_a_stage_that_cannot_be_built_is_one_line(tmp_path):
    _, outcome = run(tmp_path, ["a red boat"], Unbuildable)
    with pytest.raises(JobError) as raised:
        list(outcome)
    assert str(raised.value).startswith("Ray cannot go on: ActorDiedError: ZeroDivisionError: no such thing; ")
