#!/usr/bin/env python3
"""What Ray costs: the datagen stages on Ray against the same stages in a plain loop, and 450,000 prompts of ledger.

    python bench/datagen.py --prompts 48
    python bench/datagen.py --ledger 450000

Both sides of the first run in one process after the other, one painter with one thread each, on the same captions,
and must leave the same bytes. The second fills a ledger with a painter that paints nothing, then takes up the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil

from ip2p.config import Placement, Recipe, load_recipe
from ip2p.dataset.shards import WEIGHTS, Shard, ShardStats, plan_shards, run_id_of
from ip2p.dataset.summary import taken_up
from ip2p.postcards.captions import postcard_captions
from ip2p.seeds import stable_id
from ip2p.storage import open_folder
from ip2p.triplets.captions import CaptionRow, as_batch
from jobs._ray import CommitShard, PaintShard, Row, WriteShard, connect, on_shard, pack, run_shards


class WriteNothing:
    """A triplet writer that takes any caption as its own edit."""

    def __init__(self, recipe: Recipe, device: str):
        pass

    def __call__(self, row: Row) -> Row:
        return on_shard(row, nothing_written)


class PaintNothing:
    """A painter that only writes rows."""

    def __init__(self, recipe: Recipe, device: str, threads: int):
        pass

    def __call__(self, row: Row) -> Row:
        return on_shard(row, nothing_painted)


def nothing_written(batch: dict) -> dict:
    empty = np.array([""] * len(batch["prompt_id"]), object)
    return {**batch, "status": empty, "reason": empty, "error": empty}


def nothing_painted(batch: dict) -> dict:
    count = len(batch["prompt_id"])
    none = np.empty(count, object)
    for place in range(count):
        none[place] = []
    exhausted = np.array(["exhausted"] * count, object)
    columns = {"status": exhausted, "candidates": none, "pairs": none, "row_evals": np.zeros(count, np.int64)}
    return {**batch, **columns, **dict.fromkeys(WEIGHTS, "none")}


def plain(shards: list[Shard], recipe: Recipe, output: str) -> dict[str, float]:
    """The stages one after the other; seconds in all, and from the first committed shard to the last."""
    started = time.monotonic()
    stages = [WriteShard(recipe), PaintShard(recipe), CommitShard(output, recipe, run_id_of(recipe))]
    times = []
    for shard in shards:
        row: Row = {"name": shard.name, "payload": pack(as_batch(shard.rows))}
        for stage in stages:
            row = stage(row)
        times.append(time.monotonic())
    return {"total_s": times[-1] - started, "steady_s": times[-1] - times[0]}


def on_ray(shards: list[Shard], recipe: Recipe, output: str) -> dict[str, float]:
    started = time.monotonic()
    connect()
    placement = Placement(painter_cpus=1.0, lm_cpus=0.2, threads=1)
    times = [time.monotonic() for _ in run_shards(shards, recipe, placement, output, run_id_of(recipe))]
    return {"total_s": times[-1] - started, "steady_s": times[-1] - times[0]}


def side_by_side(prompts: int) -> dict[str, object]:
    recipe = load_recipe("postcard")
    shards = plan_shards(postcard_captions(prompts).rows, recipe)
    with tempfile.TemporaryDirectory() as folder:
        sides = {"plain": plain(shards, recipe, f"{folder}/plain"), "ray": on_ray(shards, recipe, f"{folder}/ray")}
        written = [
            {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
            for root in (Path(folder, "plain"), Path(folder, "ray"))
        ]
    ratios = {name: round(sides["ray"][name] / sides["plain"][name], 3) for name in sides["plain"]}
    return {"prompts": prompts, "shards": len(shards), **sides, "ray_over_plain": ratios,
            "same_bytes": written[0] == written[1]}  # fmt: skip


def long_ledger(prompts: int, left: int = 4000) -> dict[str, object]:
    """``prompts`` through Ray with a painter that only writes rows, killed short of ``left``, then taken up again.

    Says how the driver's memory goes along the first run, and how long the second needs to know what is left.
    """
    recipe = load_recipe("sd15", ["models.text_to_image=none", "models.triplet_lm=none"])
    placement = Placement(painter_cpus=0.5, lm_cpus=0.2)
    with tempfile.TemporaryDirectory() as output:
        connect()
        memory, done, started = [_memory_mb()], 0, time.monotonic()
        plan = plan_shards(numbered(prompts), recipe)
        for stats in run_shards(plan, recipe, placement, output, run_id_of(recipe), (WriteNothing, PaintNothing)):
            assert isinstance(stats, ShardStats), stats
            done += stats.prompts
            if done * 20 // prompts >= len(memory):
                memory.append(_memory_mb())
                print(f"{done} prompts, {time.monotonic() - started:.0f} s, driver {memory[-1]} MB", flush=True)
            if done >= prompts - left:
                break
        run_s = time.monotonic() - started
        started = time.monotonic()
        totals, todo = taken_up(plan_shards(numbered(prompts), recipe), open_folder(output))
        resume_s = time.monotonic() - started
        listed = sum(1 for _ in Path(output).rglob("*") if _.is_file())
        return {"prompts": prompts, "shards": len(plan), "files": listed, "run_s": round(run_s),
                "shards_per_s": round(len(plan) / run_s, 1), "driver_mb_along_the_run": memory,
                "resume_s": round(resume_s, 2), "prompts_done": totals.prompts, "shards_left": len(todo)}  # fmt: skip


def numbered(prompts: int) -> list[CaptionRow]:
    """Captions as they come from a file."""
    return [CaptionRow(i, stable_id("bench", i), i + 1, f"a red boat number {i} on the water") for i in range(prompts)]


def _memory_mb() -> int:
    """Resident size of this process now, in MB."""
    return psutil.Process().memory_info().rss // 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="captions painted on both sides (default %(default)s)")
    parser.add_argument("--ledger", type=int, default=0, metavar="N", help="measure resuming with N prompts instead")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    name, result = (
        ("datagen_ledger", long_ledger(args.ledger)) if args.ledger else ("datagen", side_by_side(args.prompts))
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
