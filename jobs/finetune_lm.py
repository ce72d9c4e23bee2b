#!/usr/bin/env python3
"""Teach a language model to write triplets: any causal LM in transformers' format, or a .gguf file, on written ones.

    python jobs/finetune_lm.py --set base=/models/SmolLM2-135M --output out/writer
    python jobs/datagen.py --stage triplets --captions captions.csv --set models.triplet_lm=out/writer/model \\
        --set writing.shares=even --output out/triplets

The same command run again goes on from the last whole checkpoint. The model comes to OUTPUT/model, a folder that
transformers and vLLM load. Exit code 0: trained and exported; 1: stopped by an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ip2p.config import EMBEDDED, Triplets, overridden
from ip2p.errors import InputError, JobError
from ip2p.storage import Folder, open_folder, remove_all
from jobs._command import add_output_flags, check_ours, ended, located, located_model, size_range
from jobs._progress import Progress

if typing.TYPE_CHECKING:
    from ip2p.schema import Triplet
    from ip2p.triplets.fine_tuning import FineTuning
    from jobs._ray_finetune import FineTuneWork

NOTE, SUMMARY = "fine_tuning.json", "summary.json"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="recipe field (base is needed); repeatable")
    add("--triplets", default="", help="written triplets with their task, .jsonl or .parquet … (default: the shipped)")
    add("--types", choices=("open", "postcard"), default="open", help="whose edit types they are (default %(default)s)")
    add("--output", default="out/writer", help="folder of this training, local or s3:// (default %(default)s)")
    add("--captions", default="", help="held-out captions for the valid rate (default: those of the held-out triplets)")
    add("--look-captions", type=int, default=100, help="how many of them, each epoch; 0: none (default %(default)s)")
    add("--workers", type=size_range, metavar="N or MIN:MAX", help="training processes (default: one a GPU, or 1)")
    add("--gpus-per-worker", type=float, help="default 1 where the cluster has GPUs, else 0")
    add("--threads", type=int, default=0, help="of a CPU worker (default: its share of the cores)")
    add("--micro-batch", type=int, default=8, help="triplets a forward pass (default %(default)s)")
    add("--export-openai", default="", metavar="FILE", help="write the fine-tuning file for OpenAI's service, and stop")
    add_output_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return ended(run, arguments(argv))


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    from ip2p.triplets.fine_tuning import FineTuning

    recipe = overridden(FineTuning(), args.set)
    triplets = read_labelled(args.triplets)
    if args.export_openai:
        return export_openai(args.export_openai, triplets, recipe)
    work = prepared(args, recipe, triplets)
    folder = open_folder(work.output)
    if folder.exists(SUMMARY):
        print(f"{work.output}: already trained; see {work.output}/model", file=sys.stderr)
        return 0
    train(args, work)
    return finish(args, work, folder, time.monotonic() - started)


def read_labelled(uri: str) -> list[Triplet]:
    """The triplets to learn from, each with its task where the file has one."""
    from ip2p.schema import Triplet
    from ip2p.triplets.captions import read_triplets
    from ip2p.triplets.seed import load_seeds

    if not uri:
        return load_seeds()
    found = read_triplets(uri)
    for bad in found.bad:
        print(f"warning: {uri}, line {bad.line}: {bad.message}; left out", file=sys.stderr)
    return [Triplet(row.caption, row.instruction, row.edited_caption, row.task) for row in found.rows]


def export_openai(uri: str, triplets: Sequence[Triplet], recipe: FineTuning) -> int:
    from ip2p.triplets.fine_tuning import openai_lines

    place, _, name = located(uri).rpartition("/")
    open_folder(place).write(name, ("\n".join(openai_lines(triplets, recipe)) + "\n").encode())
    print(f"{len(triplets)} triplets: {place}/{name}")
    return 0


def prepared(args: argparse.Namespace, recipe: FineTuning, triplets: list[Triplet]) -> FineTuneWork:
    """Everything that can be refused is refused here, before a cluster is joined."""
    from ip2p.triplets.fine_tuning import check_fine_tuning, split_held_out
    from jobs._ray_finetune import FineTuneWork

    check_fine_tuning(recipe)
    if args.micro_batch < 1 or args.look_captions < 0 or args.threads < 0:
        raise InputError("--micro-batch is at least 1, --look-captions and --threads at least 0")
    if recipe.tasks and not all(triplet.task for triplet in triplets):
        raise InputError("a triplet has no task; label all of them, or pass --set tasks=0")
    if recipe.base != EMBEDDED:
        recipe = dataclasses.replace(recipe, base=located_model(recipe.base))
        if not Path(recipe.base).exists():
            raise InputError(f"{recipe.base}: no such model; name a folder or a .gguf file with --set base=PATH")
    _, held_out = split_held_out(triplets, recipe)
    captions = look_captions(args, held_out, bool(recipe.tasks))
    work = FineTuneWork(
        recipe, located(args.output), triplets, captions, args.types, Triplets(max_tokens=128),
        micro_batch=args.micro_batch,
    )  # fmt: skip
    claim_folder(open_folder(work.output), recipe, triplets)
    return work


def look_captions(args: argparse.Namespace, held_out: Sequence[Triplet], tasks: bool) -> list[tuple[str, str]]:
    """Captions that no training sees, with the types in turn if the model learns ``tasks``."""
    from ip2p.triplets.captions import read_captions
    from ip2p.triplets.edit_types import edit_types

    if not args.look_captions:
        return []
    captions = [triplet.caption for triplet in held_out]
    if args.captions:
        captions = [row.caption for row in read_captions(args.captions, given=False).rows]
    asked = edit_types(args.types).names if tasks else ("",)
    return list(zip(captions[: args.look_captions], itertools.cycle(asked)))


def claim_folder(folder: Folder, recipe: FineTuning, triplets: Sequence[Triplet]) -> None:
    """Write ``fine_tuning.json``; raise InputError where the folder holds another training."""
    from ip2p.seeds import stable_id

    check_ours(folder, NOTE, "recipe.json", "manifest.json", SUMMARY)
    now = {**json.loads(recipe.to_json()), "triplets": stable_id(*map(str, triplets))}
    if folder.exists(NOTE):
        was = json.loads(folder.read(NOTE))
        changed = [
            f"{name} is {was.get(name)!r} there and {now[name]!r} here" for name in now if was.get(name) != now[name]
        ]
        if changed:
            raise InputError(f"{folder.uri}: holds a training of something else ({', '.join(changed)}); "
                             "choose another --output")  # fmt: skip
    folder.write(NOTE, (json.dumps(now, indent=1, sort_keys=True) + "\n").encode())


def train(args: argparse.Namespace, work: FineTuneWork) -> None:
    """Train on the cluster, showing what is heard."""
    from ip2p.triplets.fine_tuning import steps_of
    from jobs._ray import connect
    from jobs._ray_finetune import worker_loop
    from jobs._ray_train import describe, team_of, train_on_cluster

    connect()
    team = team_of(args.workers, args.gpus_per_worker)
    work = dataclasses.replace(work, threads=args.threads or max(1, int(team.cpus)))
    examples = len(work.triplets) - work.recipe.held_out
    with Progress(steps_of(examples, work.recipe), "steps", 0, args.quiet, args.json) as progress:
        progress.say(f"train on {examples} triplets, {work.recipe.held_out} are held out; {describe(team)}")

        def heard(kind: str, content: typing.Any) -> None:
            if kind == "note":
                progress.say(content)
            elif kind == "begun":
                progress.say(f"from step {content['step']}, {content['workers']} workers")
                progress.at(content["step"])
            elif kind == "metrics":
                if "held_out_loss" in content:
                    progress.say(look_line(content))
                if "loss" in content:
                    progress.at(content["step"], loss=round(content["loss"], 3), epoch=content["epoch"])

        train_on_cluster(work, team, f"start-{time.time_ns()}", heard, worker_loop)


def look_line(content: dict[str, typing.Any]) -> str:
    said = f"epoch {content['epoch']}: held-out loss {content['held_out_loss']:.3f}"
    if "valid_rate" in content:
        reasons = ", ".join(f"{count} {reason}" for reason, count in content["by_reason"].items())
        said += f", valid rate {100 * content['valid_rate']:.1f} % ({reasons})"
    return said


def finish(args: argparse.Namespace, work: FineTuneWork, folder: Folder, seconds: float) -> int:
    """Write ``summary.json``, which says that the training is finished."""
    from ip2p.triplets.writer_model import NOTE as MODEL_NOTE
    from jobs._ray_train import read_metrics

    if not folder.exists(f"model/{MODEL_NOTE}"):
        raise JobError(f"{work.output}/model is not whole; see that --output is on storage that the workers share")
    remove_all(folder, "ray/")  # Ray Train's notes on its own starts
    looks = [row for row in read_metrics(folder) if "held_out_loss" in row]
    names = ("epoch", "held_out_loss", "valid_rate", "by_reason")
    summary = {
        "looks": [{name: row[name] for name in names if name in row} for row in looks], "seconds": round(seconds, 1)
    }  # fmt: skip
    folder.write(SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    print(json.dumps(summary) if args.json else f"writer: {work.output}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
