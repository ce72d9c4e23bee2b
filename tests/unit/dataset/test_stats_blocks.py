"""Blocks of stats: fewer reads, the same sums, and never more than a copy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ip2p.config import load_recipe
from ip2p.dataset.shards import ShardStats, plan_shards
from ip2p.dataset.stats_blocks import StatsBlocks
from ip2p.dataset.summary import take_up
from ip2p.seeds import stable_id
from ip2p.storage import LocalFolder
from ip2p.triplets.captions import CaptionRow

SIZE = 4


def plan_of(shards: int):
    rows = [CaptionRow(i, stable_id(str(i)), i + 1, f"boat {i}") for i in range(shards)]
    return plan_shards(rows, load_recipe("postcard", ["output.prompts_per_shard=1"]))


def stats_of(shard, failed: int = 0) -> ShardStats:
    files = {f"{kind}/{shard.name}.parquet": {"bytes": 1, "sha256": "x", "rows": 1} for kind in ("pairs", "ledger")}
    number = int(shard.name.split("-")[1])
    reasons = {"error": 1} if failed else {"accepted": 1}
    return ShardStats(files, 1, number, 0, 10 * number, reasons, {})


def finish(folder: LocalFolder, *shards, failed: int = 0) -> list[ShardStats]:
    made = [stats_of(shard, failed) for shard in shards]
    for shard, stats in zip(shards, made, strict=True):
        folder.write(f"stats/{shard.name}.json", json.dumps(dataclasses.asdict(stats)).encode())
        for kind in ("pairs", "ledger"):
            folder.write(f"{kind}/{shard.name}.parquet", b"")
    return made


class Counted(LocalFolder):
    """Counts reads."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, name: str) -> bytes:
        self.reads.append(name)
        return super().read(name)


@pytest.fixture
def folder(tmp_path) -> Counted:
    return Counted(tmp_path)


def names(plan) -> list[str]:
    return [shard.name for shard in plan]


def by_name(found) -> dict[str, ShardStats]:
    return {stats.name: stats for stats in found}


def test_a_block_is_written_when_its_last_shard_is_finished_and_read_instead_of_them(folder):
    plan = plan_of(10)
    made = finish(folder, *plan)
    blocks = StatsBlocks(plan, folder, SIZE)
    for stats in reversed(made[1:]):
        blocks.add(stats)
    assert len(folder.list("blocks/")) == 1, "the second four are complete, the first are not, the last two never"
    blocks.add(made[0])
    assert len(folder.list("blocks/")) == 2
    assert by_name(StatsBlocks(plan, folder, SIZE).read(names(plan))) == by_name(made)
    assert len(folder.reads) == 2 + 2
    assert [read for read in folder.reads if read.startswith("stats/")] == [f"stats/{s.name}.json" for s in plan[8:]]


def test_what_an_earlier_run_left_without_a_block_gets_one_at_the_next_start(folder):
    plan = plan_of(8)
    made = finish(folder, *plan[:4], *plan[5:])
    assert by_name(StatsBlocks(plan, folder, SIZE).read(names(plan[:4] + plan[5:]))) == by_name(made)
    assert len(folder.list("blocks/")) == 1
    blocks = StatsBlocks(plan, folder, SIZE)
    list(blocks.read(names(plan[:4] + plan[5:])))
    blocks.add(*finish(folder, plan[4]))
    assert len(folder.list("blocks/")) == 2


def test_order_of_finishing_does_not_change_a_blocks_bytes(tmp_path):
    plan = plan_of(4)
    for name, order in (("a", plan), ("b", plan[::-1])):
        blocks = StatsBlocks(plan, LocalFolder(tmp_path / name), SIZE)
        for shard in order:
            blocks.add(stats_of(shard))
    (a,), (b,) = (list((tmp_path / name / "blocks").iterdir()) for name in "ab")
    assert (a.name, a.read_bytes()) == (b.name, b.read_bytes())


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"part": 1'])
def test_a_damaged_block_is_made_again_from_the_shards_own_stats(folder, damage):
    plan = plan_of(4)
    made = finish(folder, *plan)
    list(StatsBlocks(plan, folder, SIZE).read(names(plan)))
    (file,) = folder.list("blocks/")
    whole = folder.read(file)
    folder.write(file, damage)
    assert by_name(StatsBlocks(plan, folder, SIZE).read(names(plan))) == by_name(made)
    assert folder.read(file) == whole


def test_a_block_with_an_unfinished_shard_is_not_used(folder):
    plan = plan_of(4)
    made = finish(folder, *plan)
    list(StatsBlocks(plan, folder, SIZE).read(names(plan)))
    blocks = StatsBlocks(plan, folder, SIZE)
    assert by_name(blocks.read(names(plan[1:]))) == by_name(made[1:])
    again = dataclasses.replace(made[0], row_evals=7)  # made again, elsewhere: other bits, other hashes
    folder.write(f"stats/{plan[0].name}.json", json.dumps(dataclasses.asdict(again)).encode())
    blocks.add(again)
    assert by_name(StatsBlocks(plan, folder, SIZE).read(names(plan))) == by_name([again, *made[1:]])


def test_a_block_of_other_shards_is_not_used(folder):
    plan, other = plan_of(4), plan_of(5)[1:]
    finish(folder, *plan, *other)
    list(StatsBlocks(plan, folder, SIZE).read(names(plan)))
    assert by_name(StatsBlocks(other, folder, SIZE).read(names(other))) == by_name([stats_of(s) for s in other])


def test_a_shard_that_is_made_again_takes_its_block_with_it(folder, monkeypatch):
    monkeypatch.setattr("ip2p.dataset.summary.StatsBlocks", lambda plan, folder: StatsBlocks(plan, folder, SIZE))
    plan = plan_of(4)
    finish(folder, *plan[:3])
    finish(folder, plan[3], failed=1)
    assert take_up(plan, folder).todo == []
    assert len(folder.list("blocks/")) == 1
    run = take_up(plan, folder, retry_errors=True)
    assert run.todo == [plan[3]]
    assert run.totals.prompts == 3
    assert folder.list("blocks/") == [], "killed now, the next start must not count the old error"
    run.add(*finish(folder, plan[3]))
    assert dict(run.totals.prompts_by_reason) == {"accepted": 4}
    again = take_up(plan, folder)
    assert dict(again.totals.prompts_by_reason) == {"accepted": 4}
    assert len(folder.list("blocks/")) == 1
    assert again.totals.row_evals == 10 * (0 + 1 + 2 + 3)
