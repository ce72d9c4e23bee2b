#!/usr/bin/env python3
"""What Ray costs: the datagen stages on Ray against the same stages in a plain loop, and 450,000 prompts of ledger.

    python bench/datagen.py --prompts 48
    python bench/datagen.py --long 450000

Both sides of the first run in one process after the other, one painter with one thread each, on the same captions,
and must leave the same bytes. The second paints nothing: it runs as many prompts through Ray and watches the driver's
memory, then fills a ledger with as many and takes it up again.
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
from ip2p.dataset.shards import WEIGHTS, Shard, ShardStats, commit_shard, plan_shards, run_id_of
from ip2p.dataset.summary import take_up
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


def long_run(prompts: int, per_shard: int = 64) -> dict[str, object]:
    """``prompts`` through Ray with a painter that only writes rows: the driver's memory along the way."""
    recipe = load_recipe("sd15", [f"output.prompts_per_shard={per_shard}"])
    placement = Placement(painter_cpus=0.5, lm_cpus=0.2)
    with tempfile.TemporaryDirectory() as output:
        connect()
        run = take_up(plan_shards(numbered(prompts), recipe), open_folder(output))
        memory, started = [_memory_mb()], time.monotonic()
        for stats in run_shards(run.todo, recipe, placement, output, run_id_of(recipe), (WriteNothing, PaintNothing)):
            assert isinstance(stats, ShardStats), stats
            run.add(stats)
            if run.totals.prompts * 20 // prompts >= len(memory):
                memory.append(_memory_mb())
                print(f"{run.totals.prompts} prompts, {time.monotonic() - started:.0f} s, {memory[-1]} MB", flush=True)
        seconds = time.monotonic() - started
    return {"prompts": prompts, "shards": len(run.todo), "seconds": round(seconds), "driver_mb": memory,
            "shards_per_s": round(len(run.todo) / seconds, 1)}  # fmt: skip


def long_ledger(prompts: int, left: int = 4000) -> dict[str, object]:
    """All but ``left`` of ``prompts`` in the ledger, in the shards of ``sd15``: seconds until a start knows the rest.

    The first start finds each shard's own stats, the second finds them in blocks.
    """
    recipe = load_recipe("sd15")
    with tempfile.TemporaryDirectory() as output:
        folder, plan = open_folder(output), plan_shards(numbered(prompts), recipe)
        for shard in plan[: len(plan) - left // recipe.output.prompts_per_shard]:
            commit_shard(folder, shard.name, nothing_painted(nothing_written(as_batch(shard.rows))), recipe, "run")
        seconds = []
        for _ in range(2):
            started = time.monotonic()
            again = take_up(plan_shards(numbered(prompts), recipe), open_folder(output))
            seconds.append(round(time.monotonic() - started, 2))
        return {"prompts": prompts, "shards": len(plan), "first_start_s": seconds[0], "next_start_s": seconds[1],
                "prompts_done": again.totals.prompts, "shards_left": len(again.todo)}  # fmt: skip


def numbered(prompts: int) -> list[CaptionRow]:
    """Captions as they come from a file."""
    return [CaptionRow(i, stable_id("bench", i), i + 1, f"a red boat number {i} on the water") for i in range(prompts)]


def _memory_mb() -> int:
    """Resident size of this process now, in MB."""
    return psutil.Process().memory_info().rss // 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="captions painted on both sides (default %(default)s)")
    parser.add_argument(
        "--long", type=int, default=0, metavar="N", help="N prompts of which nothing is painted instead"
    )
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    name = "datagen_long" if args.long else "datagen"
    result = {"run": long_run(args.long), "ledger": long_ledger(args.long)} if args.long else side_by_side(args.prompts)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
