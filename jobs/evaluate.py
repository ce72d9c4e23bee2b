#!/usr/bin/env python3
"""Measure an edit model: exact success on held-out postcards, and the paper's curve of image against direction.

    python jobs/evaluate.py --model out/edit/model --output out/evaluation
    python jobs/evaluate.py --model out/edit/model --curve --examples 100 --output out/curve
    ray job submit --working-dir . -- python jobs/evaluate.py --model /models/edit --pairs s3://bucket/run --curve \\
        --set models.clip=ViT-L-14-quickgelu --set models.clip_pretrained=openai --output s3://bucket/curve

The exam edits postcards that no training drawing shows, beside SDEdit with the text-to-image model and beside no edit
at all, on the same pictures. With --pairs the pictures are those of the runs' test split, and only the curve is drawn.
Exit code 0: measured; 1: stopped by an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import typing
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ip2p.config import Recipe, load_recipe
from ip2p.errors import InputError, JobError
from ip2p.storage import Folder, open_folder
from jobs._command import add_output_flags, check_ours, ended, located, located_model, size_range
from jobs._progress import Progress

if typing.TYPE_CHECKING:
    from jobs._ray_evaluate import Part, Settings

METHODS = ("ours", "sdedit", "no edit", "truth")
EXAMPLES_A_PART = 16
SUMMARY = "summary.json"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="embedded", metavar="DIR", help="edit model (default: the shipped one)")
    add("--output", default="out/evaluation", help="folder, local or s3://bucket/prefix (default %(default)s)")
    add("--recipe", default="postcard", help="names CLIP and the text-to-image model (default %(default)s)")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a recipe field; repeatable")
    add("--examples", type=int, default=500, help="pictures (default %(default)s)")
    add("--exam", type=int, default=2024, help="number of the set of postcards (default %(default)s)")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what takes the exam (default: all)")
    add("--curve", action="store_true", help="the paper's curve instead of the exam")
    add("--pairs", nargs="+", default=[], metavar="RUN", help="take the curve's pictures from these runs' test split")
    add("--cfg-text", type=float, nargs="+", help="s_T; the curve takes several (default: the model's own, or 7.5)")
    add("--cfg-image", type=float, nargs="+", help="s_I (default: the model's own, or 1.5; of the curve 1.0 to 2.2)")
    add("--steps", type=int, default=20, help="denoising steps (default %(default)s; the released script took 100)")
    add("--strength", type=float, default=0.75, help="of SDEdit, 0..1 (default %(default)s)")
    add("--sdedit-cfg", type=float, default=7.5, help="guidance scale of SDEdit (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--workers", type=size_range, default=None, metavar="MIN:MAX", help="actors (default 1:cores or 1:GPUs)")
    add("--gpus-per-worker", type=float, default=None, help="default 1 where the cluster has GPUs, else 0")
    add_output_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return ended(run, arguments(argv))


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    recipe = load_recipe(args.recipe, args.set)
    folder = open_folder(located(args.output))
    settings = checked(args, recipe)
    parts = planned(args)
    shown = shown_settings(args, settings)
    claim_folder(folder, "curve" if args.curve else "exam", shown)
    records = measured(args, settings, parts)
    report = curve_report(folder, records) if args.curve else exam_report(folder, records)
    report |= {"settings": shown, "seconds": round(time.monotonic() - started, 1)}
    folder.write(SUMMARY, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report) if args.json else f"figures and numbers: {folder.uri}")
    return 0


def checked(args: argparse.Namespace, recipe: Recipe) -> Settings:
    """What every worker is given. Raises an Ip2pError for what cannot be measured, before a cluster is joined."""
    from ip2p.editing.editor import check_settings
    from ip2p.evaluation.trade_off import IMAGE_GUIDANCE_SCALES
    from ip2p.models.components import model_folder, own_scales
    from ip2p.models.preflight import check_measured
    from jobs._ray_evaluate import Settings

    model = located_model(args.model)
    own_text, own_image = own_scales(model_folder("edit_model", model, setting="--model"))
    weights = check_measured(model, recipe, args.curve, not args.curve and "sdedit" in args.methods)
    text_scales = args.cfg_text or [own_text]
    image_scales = args.cfg_image or (list(IMAGE_GUIDANCE_SCALES) if args.curve else [own_image])
    for s_t in text_scales:
        for s_i in image_scales:
            check_settings(args.steps, "euler_ancestral", args.seed, s_t, s_i)
    if not 0 <= args.strength <= 1:
        raise InputError(f"--strength must be between 0 and 1, got {args.strength}")
    if args.examples < 1:
        raise InputError(f"--examples must be at least 1, got {args.examples}")
    if args.pairs and not args.curve:
        raise InputError("--pairs has no known answers to be examined on; add --curve, or leave it out")
    if not args.curve and len(text_scales) * len(image_scales) > 1:
        raise InputError("the exam takes one --cfg-text and one --cfg-image; several are for --curve")
    return Settings(
        model, weights, recipe, tuple(text_scales), tuple(image_scales), args.steps, args.strength, args.sdedit_cfg,
        args.seed, args.exam,
    )  # fmt: skip


def shown_settings(args: argparse.Namespace, settings: Settings) -> dict[str, typing.Any]:
    """All that the numbers depend on, as JSON takes it."""
    return {**settings.shown(), "examples": args.examples, "methods": args.methods, "pairs": args.pairs}


def claim_folder(folder: Folder, kind: str, shown: dict[str, typing.Any]) -> None:
    """Raise InputError where the folder holds something that these numbers would take the place of."""
    check_ours(folder, "records.parquet", "about.json", "recipe.json", "manifest.json", SUMMARY)
    if not folder.exists(SUMMARY):
        return
    there = json.loads(folder.read(SUMMARY))
    was, now = there.get("settings", {}), json.loads(json.dumps(shown))
    changed = [name for name in now if was.get(name) != now[name]] if kind in there else [kind]
    if changed:
        raise InputError(
            f"{folder.uri}: holds an evaluation of something else (differs in {', '.join(changed)}); "
            "choose another --output, or delete it"
        )


def planned(args: argparse.Namespace) -> dict[str, Part]:
    """The work in pieces, by name, in the order in which their records are wanted."""
    from jobs._ray_evaluate import Part

    if args.pairs:
        return pair_parts([located(uri) for uri in args.pairs], args.examples)
    methods = ["curve"] if args.curve else args.methods
    return {
        f"{method}-{first}": Part(method, first, min(EXAMPLES_A_PART, args.examples - first))
        for method in methods
        for first in range(0, args.examples, EXAMPLES_A_PART)
    }


def pair_parts(runs: Sequence[str], at_most: int) -> dict[str, Part]:
    """Pieces of the first ``at_most`` pairs of the runs' test split."""
    from ip2p.training.pair_index import list_pairs
    from jobs._ray_evaluate import Part

    parts: dict[str, Part] = {}
    first = 0
    for shard in list_pairs(runs, "test"):
        for start in range(0, len(shard.rows), EXAMPLES_A_PART):
            rows = shard.rows[start : start + min(EXAMPLES_A_PART, at_most - first)]
            if rows:
                parts[f"curve-{first}"] = Part("curve", first, len(rows), dataclasses.replace(shard, rows=rows))
                first += len(rows)
    return parts


def measured(args: argparse.Namespace, settings: Settings, parts: dict[str, Part]) -> list[dict[str, typing.Any]]:
    """The records of all parts, in the order of the exam."""
    from jobs._ray import FailedShard, connect
    from jobs._ray_evaluate import evaluate_parts
    from jobs._ray_train import team_of

    connect()
    team = team_of(None, args.gpus_per_worker)
    pool = args.workers or ((1, team.workers[1]) if team.gpus else (1, team.cores))
    found: dict[str, list[dict[str, typing.Any]]] = {}
    total = sum(part.count for part in parts.values())
    with Progress(total, "pictures", 0, args.quiet, args.json) as progress:
        for name, done in evaluate_parts(settings, parts, team, pool):
            if isinstance(done, FailedShard):
                raise JobError(f"part {name}: {done.why}; run the same command again")
            found[name] = done
            progress.tell(parts[name].count)
    return [record for name in parts for record in found[name]]


def exam_report(folder: Folder, records: list[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    """Success by method and task as JSON, Parquet and bars."""
    from ip2p.evaluation.edit_success import draw_success, summarise

    methods = list(dict.fromkeys(record["method"] for record in records))
    results = {name: summarise([record for record in records if record["method"] == name]) for name in methods}
    write_figure(folder, "success.png", lambda path: draw_success(results, path))
    write_table(folder, "records.parquet", records)
    for name, result in results.items():
        tasks = ", ".join(f"{task} {one['success']['mean']:.0%}" for task, one in result["by_task"].items())
        print(f"{name}: {result['success']['mean']:.1%} of {result['count']} exact ({tasks})", file=sys.stderr)
    return {"exam": results}


def curve_report(folder: Folder, records: list[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    """The points of the curve as JSON, the samples as Parquet, and the figure."""
    from ip2p.evaluation.trade_off import curve, draw_curves

    points = curve(records)
    write_figure(folder, "curve.png", lambda path: draw_curves({"ours": points}, path))
    write_table(folder, "records.parquet", records)
    return {"curve": points}


def write_figure(folder: Folder, name: str, draw: typing.Callable[[Path], None]) -> None:
    """``draw`` writes a local file; it comes to ``folder``, wherever that is."""
    with tempfile.TemporaryDirectory() as scratch:
        draw(Path(scratch) / name)
        folder.write(name, (Path(scratch) / name).read_bytes())


def write_table(folder: Folder, name: str, records: list[dict[str, typing.Any]]) -> None:
    from ip2p.evaluation.trade_off import write_records

    write_figure(folder, name, lambda path: write_records(records, path))


if __name__ == "__main__":
    sys.exit(main())
