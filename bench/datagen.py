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
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from ip2p.config import Placement, Recipe, load_recipe
from ip2p.dataset.shards import WEIGHTS, Shard, commit_shard, finished_shards, plan_shards, run_id_of, unfinished
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


def long_ledger(prompts: int, last: int = 4096) -> dict[str, object]:
    """Fill all but ``last`` prompts without Ray, then resume: seconds until painting starts, and driver memory."""
    recipe = load_recipe("postcard", ["output.prompts_per_shard=64"])
    rows = [CaptionRow(i, stable_id("bench", i), i + 1, f"a red boat number {i} on the water") for i in range(prompts)]
    with tempfile.TemporaryDirectory() as output:
        folder, started = open_folder(output), time.monotonic()
        shards = plan_shards(rows, recipe)
        for shard in shards[: -(last // 64)]:
            batch = nothing_painted(nothing_written(as_batch(shard.rows)))
            commit_shard(folder, shard.name, batch, recipe, run_id_of(recipe))
        fill_s = time.monotonic() - started
        connect()
        started, before = time.monotonic(), _memory_mb()
        todo = unfinished(plan_shards(rows, recipe), folder)
        resume_s = time.monotonic() - started
        stages = (WriteNothing, PaintNothing)
        placement = Placement(painter_cpus=0.5, lm_cpus=0.2)
        first_s = 0.0
        for number, _ in enumerate(run_shards(todo, recipe, placement, output, run_id_of(recipe), stages)):
            first_s = first_s or time.monotonic() - started
            assert number < len(todo)
        return {"prompts": prompts, "shards": len(shards), "fill_s": round(fill_s, 1), "resumed": len(todo),
                "resume_s": round(resume_s, 2), "first_shard_s": round(first_s, 1), "driver_mb_before": before,
                "driver_mb_after": _memory_mb(), "finished": len(finished_shards(folder))}  # fmt: skip


def _memory_mb() -> int:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


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
