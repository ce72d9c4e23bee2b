#!/usr/bin/env python3
"""Captions to kept image pairs: a language model writes triplets, diffusion paints candidates, CLIP filters them.

    python jobs/datagen.py --recipe postcard --prompts 24 --output out/demo
    ray job submit --working-dir . -- python jobs/datagen.py --captions s3://bucket/captions.jsonl --output s3://bucket/run
    python jobs/datagen.py --stage triplets --captions captions.csv --output out/triplets    # write, paint later

The same command run again goes on where it stopped. Exit code 0: all prompts worked on; 3: finished, but some input
rows or prompts could not be used, or nothing was kept (see summary.json); 1: stopped by an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ip2p.config import RECIPES, Recipe, load_recipe, recipe_from_json
from ip2p.errors import InputError
from ip2p.storage import Folder, open_folder
from jobs._command import add_output_flags, check_ours, ended, located, size_range
from jobs._progress import Progress
from jobs._triplet_stage import add_flags, check_no_flags, write_triplets

if typing.TYPE_CHECKING:
    from ip2p.config import Placement
    from ip2p.dataset.summary import TakenUp, Totals
    from ip2p.triplets.captions import CaptionFile

# What an import, an export, written triplets, a training and a fine-tuning begin with, and what others end with.
OTHERS = (
    "import.json", "export.json", "triplet_run.json", "about.json", "fine_tuning.json", "manifest.json", "summary.json"
)  # fmt: skip


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("all", "triplets"), default="all", help="triplets: write them only (docs/triplets.md)")
    add("--recipe", default="postcard", help=f"what to make: {', '.join(sorted(RECIPES))} (default %(default)s)")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a recipe field; repeatable")
    add("--output", default="out/datagen", help="run folder, local or s3://bucket/prefix (default %(default)s)")
    add("--captions", default="", help=".jsonl .csv .parquet or .txt, local or s3:// (default: postcards' own grammar)")
    add("--triplets", default="", help="the same kinds of file, holding ready triplets (input/edit/output work too)")
    add("--prompts", type=int, default=None, help="use the first N captions (default: all; 24 without --captions)")
    add(
        "--painters",
        type=size_range,
        default=None,
        metavar="MIN:MAX",
        help="painter actors (default 1:cores, 1:GPUs)",
    )
    add("--writers", type=size_range, default=None, metavar="MIN:MAX", help="LM actors (default 1:1, on GPUs 1:GPUs)")
    add("--painter-gpus", type=float, default=None, help="GPUs a painter; fractions share one (default 0.8, 0 on CPU)")
    add("--writer-gpus", type=float, default=None, help="GPUs an LM actor (default 0.2, 0 on CPU)")
    add("--retry-errors", action="store_true", help="work again on prompts that ended in an error")
    add("--redo-changed", action="store_true", help="make anew all shards whose captions changed; the old are deleted")
    add_output_flags(parser)
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return ended(run, arguments(argv))


def run(args: argparse.Namespace) -> int:
    if args.stage == "triplets":
        return write_triplets(args, read_input)
    started = time.monotonic()
    check_no_flags(args)
    recipe = load_recipe(args.recipe, [*args.set, *(["triplets.writer=given"] if args.triplets else [])])
    folder = open_folder(located(args.output))
    captions = read_input(args, recipe)
    claim_folder(folder, recipe)
    taken = what_is_left(args, recipe, folder, captions)
    report_bad_rows(folder, captions)
    if taken.todo:
        make_pairs(args, recipe, folder, taken, len(captions.rows))
    return finish(args, folder, taken.totals, len(captions.bad), time.monotonic() - started)


def claim_folder(folder: Folder, recipe: Recipe) -> None:
    """Write ``recipe.json`` and ``weights.json``; raise InputError where the folder holds something else."""
    from ip2p.models.preflight import check_model_files

    check_ours(folder, "weights.json", *OTHERS)  # a training has a recipe.json too
    weights = check_model_files(recipe)
    if not folder.exists("recipe.json"):
        folder.write("weights.json", (json.dumps(weights, indent=1, sort_keys=True) + "\n").encode())
        folder.write("recipe.json", recipe.to_json().encode())
        return
    there = recipe_from_json(folder.read("recipe.json").decode())
    if there != recipe:
        raise InputError(
            f"{folder.uri}: holds a run of another recipe ({_difference(there, recipe)}); "
            "choose another --output, or pass the same --recipe and --set"
        )
    other = sorted(name for name, id_ in json.loads(folder.read("weights.json")).items() if weights.get(name) != id_)
    if other:
        raise InputError(
            f"{folder.uri}: was begun with other weights of {', '.join(other)}; choose another --output, "
            "or put back the weights that its weights.json names"
        )


def _difference(there: Recipe, here: Recipe) -> str:
    def flat(recipe: Recipe) -> dict[str, object]:
        values = json.loads(recipe.to_json())
        sections = {name: value for name, value in values.items() if isinstance(value, dict)}
        inner = {f"{name}.{field}": v for name, section in sections.items() for field, v in section.items()}
        return inner | {name: value for name, value in values.items() if name not in sections}

    old, new = flat(there), flat(here)
    return ", ".join(f"{name} is {old[name]!r} there and {new[name]!r} here" for name in old if old[name] != new[name])


def read_input(args: argparse.Namespace, recipe: Recipe) -> CaptionFile:
    from ip2p.postcards.captions import postcard_captions
    from ip2p.triplets.captions import read_captions, read_triplets

    if args.prompts is not None and args.prompts < 1:
        raise InputError(f"--prompts must be at least 1, got {args.prompts}")
    if args.captions and args.triplets:
        raise InputError("--captions and --triplets exclude each other")
    file = args.captions or args.triplets
    pictures = recipe.pairs.original == "given" and args.stage == "all"
    if file:
        # Painters have other working directories than this process, in which pictures may lie.
        file = located(file) if pictures else file
        if recipe.triplets.writer == "given":
            return read_triplets(file, args.prompts, pictures=pictures)
        return read_captions(file, args.prompts, given=False, pictures=pictures)
    if pictures:
        raise InputError("pairs.original=given needs --captions or --triplets FILE with a column url: the pictures")
    if recipe.name != "postcard" or recipe.triplets.writer == "given":
        raise InputError(f"--recipe {recipe.name} needs --captions or --triplets FILE (.jsonl, .csv, .parquet, .txt)")
    return postcard_captions(args.prompts or 24, recipe.seed)


def report_bad_rows(folder: Folder, captions: CaptionFile) -> None:
    """Say which input rows were left out, and leave them in ``bad_rows.jsonl``."""
    if not captions.bad:
        folder.delete("bad_rows.jsonl")
        return
    lines = [json.dumps({"line": bad.line, "message": bad.message}) for bad in captions.bad]
    folder.write("bad_rows.jsonl", ("\n".join(lines) + "\n").encode())
    for bad in captions.bad[:10]:
        print(f"warning: {captions.uri}, line {bad.line}: {bad.message}; left out", file=sys.stderr)
    if len(captions.bad) > 10:
        print(f"warning: {len(captions.bad)} rows left out in all, see {folder.uri}/bad_rows.jsonl", file=sys.stderr)


def what_is_left(args: argparse.Namespace, recipe: Recipe, folder: Folder, captions: CaptionFile) -> TakenUp:
    """What the folder holds of these captions and what is left to do. Says on stderr what is made anew."""
    from ip2p.dataset.shards import plan_shards
    from ip2p.dataset.summary import take_up

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    return take_up(plan_shards(captions.rows, recipe), folder, args.retry_errors, args.redo_changed, warn)


def make_pairs(args: argparse.Namespace, recipe: Recipe, folder: Folder, run: TakenUp, prompts: int) -> None:
    """Work on every shard that is not finished yet; ``prompts`` is how many there are in all."""
    from jobs._ray import connect, default_placement, waits_for

    connect()
    placement = default_placement(**_asked(args))
    folder.delete("manifest.json")  # it says that the run is finished; from here on nothing is refused any more
    with Progress(prompts, "prompts", run.totals.prompts, args.quiet, args.json) as progress:
        progress.say(f"pools: {placement.pools()}")
        if missing := waits_for(placement):
            progress.say(missing)
        _work_on(run, recipe, placement, folder, progress)


def _work_on(run: TakenUp, recipe: Recipe, placement: Placement, folder: Folder, progress: Progress) -> None:
    """Add each shard that gets done to ``run``. Raises JobError at the end if some failed."""
    from ip2p.dataset.shards import run_id_of
    from jobs._ray import good_shards, run_shards

    totals = run.totals
    evals_before, started = totals.row_evals, time.monotonic()
    for done in good_shards(run_shards(run.todo, recipe, placement, folder.uri, run_id_of(recipe)), progress.say):
        run.add(done)
        rate = (totals.row_evals - evals_before) / (time.monotonic() - started)
        progress.tell(done.prompts, kept_pairs=totals.kept_pairs, row_evals_per_s=round(rate))


def _asked(args: argparse.Namespace) -> dict[str, typing.Any]:
    wanted = {
        "painter_actors": args.painters, "lm_actors": args.writers, "painter_gpus": args.painter_gpus,
        "lm_gpus": args.writer_gpus,
    }  # fmt: skip
    return {name: value for name, value in wanted.items() if value is not None}


def finish(args: argparse.Namespace, folder: Folder, totals: Totals, bad_rows: int, seconds: float) -> int:
    """Write contact sheet, summary and manifest (last: it says that the run is whole), and report."""
    from ip2p.dataset.contact_sheet import contact_sheet
    from ip2p.dataset.manifest import write_manifest
    from ip2p.dataset.summary import summary_bytes, summary_of

    summary = summary_of(totals, bad_rows, seconds)
    folder.write("summary.json", summary_bytes(summary))
    folder.write("contact_sheet.png", contact_sheet(folder, totals.files))
    write_manifest(folder, totals.files)
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"{summary['prompts']} prompts, {summary['candidates']} candidates, {summary['kept_pairs']} pairs kept, "
            f"{summary['row_evals_per_kept_pair']} row-evals a kept pair, {summary['seconds']} s"
        )
        print(f"contact sheet: {folder.uri}/contact_sheet.png")
    return exit_code(summary)


def exit_code(summary: dict[str, typing.Any]) -> int:
    errors = summary["prompts_by_reason"].get("error", 0)
    if not summary["kept_pairs"]:
        reasons = summary["kept_by_reason"] or summary["prompts_by_reason"]
        print(f"error: no pair was kept; reasons: {reasons}", file=sys.stderr)
    if errors:
        print(
            f"error: {errors} prompts failed; column error of the ledger says why; --retry-errors tries again",
            file=sys.stderr,
        )
    return 3 if errors or summary["bad_input_rows"] or not summary["kept_pairs"] else 0


if __name__ == "__main__":
    sys.exit(main())
