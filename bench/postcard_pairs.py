#!/usr/bin/env python3
"""Are the kept pairs right? Exact edits among candidates, by Prompt-to-Prompt mode, before and after the filter.

    python bench/postcard_pairs.py --prompts 120 --candidates 8 --output docs/figures
    python bench/postcard_pairs.py --recipe postcard-corpus --modes off cross    # edits of given drawings

Triplets come from the grammar, whose edits are known as data. A pair counts as exact when the reader finds the asked
change and nothing else, layout included (ip2p/evaluation/exact_edits.py).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from ip2p.config import Recipe, load_recipe
from ip2p.evaluation.exact_edits import asked_changes, judge_edit
from ip2p.images import decode_image, encode_image
from ip2p.models.components import embedded_folder
from ip2p.pairs.filtering import judge
from ip2p.pairs.painter import PaintPairs
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import TASKS, EditExample, sample_example
from ip2p.postcards.reader import load_reader, read
from ip2p.postcards.renderer import render
from ip2p.schema import Candidate

PAIR_SET = 78
P_BINS = (0.1, 0.3, 0.5, 0.7, 0.9)
KEEP_ALL = [f"filter.min_{name}=-2" for name in ("original", "edited", "image", "direction")] + ["filter.max_kept=999"]


def examples(count: int) -> list[EditExample]:
    """``count`` grammar edits, the tasks in turn."""
    found, index = [], 0
    while len(found) < count:
        task = TASKS[len(found) % len(TASKS)]
        example = sample_example(scene_of(PAIR_SET, index, None), np.random.default_rng((PAIR_SET, index)), task)
        if example.task == task:
            found.append(example)
        index += 1
    return found


def paint(recipe: Recipe, chosen: dict[int, EditExample]) -> list[list[dict]]:
    """All candidates of each example with pictures and scores; its drawing is the original where one is given."""
    painter = PaintPairs(recipe)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        drawing = Path(scratch) / "drawing.png"
        for number, example in chosen.items():
            drawing.write_bytes(encode_image(render(example.scene, recipe.pairs.resolution)))
            row = {"prompt_id": f"bench-{number}", "status": "", "caption": example.caption,
                   "edited_caption": example.edited_caption, "picture": str(drawing)}  # fmt: skip
            painted = painter.paint_row(row)
            if painted["error"]:
                raise RuntimeError(painted["error"])
            rows.append(painted["pairs"])
    return rows


def records(mode: str, recipe: Recipe, chosen: dict[int, EditExample]) -> list[dict]:
    """One record a candidate of the numbered examples: scores, p, and the verdict on it."""
    torch.set_num_threads(1)
    reader = load_reader(embedded_folder("reader"))
    found = []
    for (number, example), pairs in zip(chosen.items(), paint(recipe, chosen), strict=True):
        pictures = [[decode_image(pair[name]) for pair in pairs] for name in ("original_image", "edited_image")]
        unit = [torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2).float() / 127.5 - 1 for p in pictures]
        changes = asked_changes(example.scene, example.edited_scene)
        for pair, before, after in zip(pairs, read(reader, unit[0]), read(reader, unit[1]), strict=True):
            verdict = judge_edit(before, after, changes)
            scores = {name: float(pair[name]) for name in pair if name.startswith("sim_")}
            found.append(
                {"mode": mode, "prompt": number, "task": example.task, "p": float(pair["p2p_threshold"]), **scores,
                 "seed": pair["seed"], "exact": verdict.exact, "changed_as_asked": verdict.changed_as_asked,
                 "nothing_else": verdict.nothing_else, "same_layout": verdict.same_layout}
            )  # fmt: skip
    return found


def all_records(
    modes: Sequence[str], recipes: dict[str, Recipe], chosen: list[EditExample], processes: int
) -> Iterator[tuple[str, list[dict]]]:
    """The records of each mode, painted by several processes at a time: on a CPU that is faster than threads."""
    parts = [dict(list(enumerate(chosen))[k::processes]) for k in range(processes)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {mode: [pool.submit(records, mode, recipes[mode], part) for part in parts] for mode in modes}
        for mode, futures in waiting.items():
            yield mode, sorted((r for future in futures for r in future.result()), key=lambda r: r["prompt"])


def recorded(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """The records of each mode from ``postcard_pairs_candidates.json``."""
    for mode, found in itertools.groupby(json.loads(path.read_text()), lambda record: record["mode"]):
        yield mode, list(found)


def filtered(found: list[dict], recipe: Recipe) -> list[dict]:
    """The records that the recipe's filter keeps, prompt by prompt."""
    kept = []
    for number in sorted({record["prompt"] for record in found}):
        mine = [record for record in found if record["prompt"] == number]
        scores = ("sim_original", "sim_edited", "sim_image", "sim_direction")
        candidates = [Candidate(r["seed"], r["p"], 1.0, **{name: r[name] for name in scores}) for r in mine]
        judged = judge(candidates, recipe.filter)
        for record, candidate in zip(mine, judged, strict=True):
            record["reason"] = candidate.reason
            if candidate.reason == "kept":
                kept.append(record)
    return kept


def share(found: Sequence[dict], name: str = "exact") -> float | None:
    return round(sum(record[name] for record in found) / len(found), 3) if found else None


def summarise(found: list[dict], kept: list[dict]) -> dict:
    """Shares of exact pairs before and after the filter, by task and by p, and of what each of its rules rejects."""
    passed = sum(record["reason"] in ("kept", "over_max_kept") for record in found)
    groups = {f"{low}-{high}": (low, high) for low, high in itertools.pairwise(P_BINS)}
    return {
        "candidates": len(found), "pass_share": round(passed / len(found), 3), "kept": len(kept),
        "exact_before_filter": share(found), "exact_kept": share(kept),
        "parts_before": {n: share(found, n) for n in ("changed_as_asked", "nothing_else", "same_layout")},
        "parts_kept": {n: share(kept, n) for n in ("changed_as_asked", "nothing_else", "same_layout")},
        "by_task": {
            task: [share([r for r in f if r["task"] == task]) for f in (found, kept)] for task in TASKS
        },
        "by_reason": {
            reason: [count, share([r for r in found if r["reason"] == reason])]
            for reason, count in sorted(collections.Counter(r["reason"] for r in found).items())
        },
        "by_p": {
            name: [share([r for r in f if low <= r["p"] < high]) for f in (found, kept)]
            for name, (low, high) in groups.items()
        },
    }  # fmt: skip


def calibrated(found: list[dict], least: float = 0.15, most: float = 0.30) -> dict[str, float]:
    """Thresholds under which the share of exact edits among passing candidates is largest.

    Searched on a grid of each score's quantiles, with between ``least`` and ``most`` of the candidates passing.
    """
    exact = np.array([record["exact"] for record in found])
    scores = {
        name: np.array([r[name] for r in found])
        for name in ("sim_image", "sim_direction", "sim_original", "sim_edited")
    }
    grids = [np.quantile(values, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)) for values in scores.values()]
    best, chosen = -1.0, {}
    for bounds in itertools.product(*grids):
        passing = np.all([values >= bound for values, bound in zip(scores.values(), bounds, strict=True)], axis=0)
        if least <= passing.mean() <= most and exact[passing].mean() > best:
            best = exact[passing].mean()
            chosen = {name.replace("sim_", "min_"): round(float(b), 2) for name, b in zip(scores, bounds, strict=True)}
    return chosen


def figure(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    places = np.arange(len(results))
    for offset, name, label in ((-0.2, "exact_before_filter", "all candidates"), (0.2, "exact_kept", "kept")):
        left.bar(places + offset, [result[name] or 0 for result in results.values()], 0.38, label=label)
    left.set_xticks(places, list(results))
    left.set_ylabel("share of exact edits")
    left.set_xlabel("Prompt-to-Prompt mode")
    left.legend()
    for mode, result in results.items():
        (line,) = right.plot([pair[0] for pair in result["by_p"].values()], marker="o", label=f"{mode}, all")
        kept = [pair[1] for pair in result["by_p"].values()]
        right.plot(kept, marker="o", linestyle="--", color=line.get_color(), label=f"{mode}, kept")
    right.set_xticks(range(len(P_BINS) - 1), list(next(iter(results.values()))["by_p"]))
    right.set_xlabel("p (share of steps with shared attention)")
    right.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="postcard", help="as for jobs/datagen.py (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=120, help="edits, the tasks in turn (default %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="a prompt (default %(default)s)")
    parser.add_argument("--modes", nargs="+", default=["off", "self", "cross"])
    parser.add_argument("--set", action="append", default=[], help="recipe overrides, as for jobs/datagen.py")
    parser.add_argument("--processes", type=int, default=2, help="that paint side by side (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    parser.add_argument("--again", type=Path, metavar="FILE", help="judge the candidates of an earlier run, paint none")
    parser.add_argument("--calibrate", action="store_true", help="search thresholds on one half, report on the other")
    args = parser.parse_args()
    chosen, results, raw = examples(args.prompts), {}, []
    settings = {m: [*args.set, f"pairs.candidates={args.candidates}", f"pairs.p2p_mode={m}"] for m in args.modes}
    recipes = {mode: load_recipe(args.recipe, [*settings[mode], *KEEP_ALL]) for mode in args.modes}
    painted = recorded(args.again) if args.again else all_records(args.modes, recipes, chosen, args.processes)
    for mode, found in painted:
        wanted = settings[mode]
        results[mode] = summarise(found, filtered(found, load_recipe(args.recipe, wanted)))
        raw += found
        print(mode, json.dumps(results[mode]), flush=True)
        if args.calibrate:
            wanted += [f"filter.{n}={v}" for n, v in calibrated([r for r in found if r["prompt"] % 2 == 0]).items()]
            other = [r for r in found if r["prompt"] % 2]
            report = summarise(other, filtered(other, load_recipe(args.recipe, wanted)))
            print(mode, "calibrated", wanted[-4:], json.dumps(report), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "postcard_pairs.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "postcard_pairs_candidates.json").write_text(json.dumps(raw) + "\n")
    figure(results, args.output / "postcard_pairs.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
