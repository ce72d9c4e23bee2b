#!/usr/bin/env python3
"""Fine-tune a text-to-image model on kept pairs, so that it edits pictures by instructions.

    python jobs/train.py --pairs out/demo --output out/edit
    ray job submit --working-dir . -- python jobs/train.py --recipe sd15 --set base=/models/sd15 --cache-latents \\
        --pairs s3://bucket/run-1 s3://bucket/run-2 --output s3://bucket/edit --workers 8

The same command run again goes on from the last whole checkpoint; a higher --set steps=N goes on further. The edit
model comes to OUTPUT/model, a folder that diffusers and `ip2p edit --ckpt` load. Exit code 0: trained and exported;
1: stopped by an error.
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

from ip2p.doctor.accelerator import NEEDED_GIB
from ip2p.errors import InputError, JobError
from ip2p.storage import Folder, open_folder, remove_all
from ip2p.training.recipe import TRAINING_RECIPES, TrainingRecipe, load_training_recipe, training_recipe_from_json
from jobs._command import add_output_flags, check_ours, ended, located, located_model, size_range
from jobs._progress import Progress

if typing.TYPE_CHECKING:
    from jobs._ray_train import Team, Work

SUMMARY, MODEL = "summary.json", "model"
EXPORT_DTYPES = ("float32", "float16", "bfloat16")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    recipes = ", ".join(sorted(TRAINING_RECIPES))
    add("--recipe", default="postcard", help=f"what to make: {recipes} (default %(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a recipe field; repeatable")
    add("--pairs", nargs="+", required=True, metavar="RUN", help="run folders of jobs/datagen.py or `ip2p import`")
    add("--output", default="out/edit", help="folder of this training, local or s3://bucket/prefix (%(default)s)")
    add("--workers", type=size_range, metavar="N or MIN:MAX", help="training processes (default: one a GPU, or 1)")
    add("--gpus-per-worker", type=float, help="default 1 where the cluster has GPUs, else 0")
    add("--threads", type=int, default=0, help="of a CPU worker (default: its share of the cores)")
    add(
        "--cache-latents", nargs="?", const="", default=None, metavar="DIR",
        help="encode pictures and texts once, into DIR (default OUTPUT/cache), so that steps run the UNet alone",
    )  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="a third more arithmetic for far less memory")
    add(
        "--shard", action="store_true",
        help="cut weights, average and optimizer over the workers (FSDP), for a UNet that no one GPU holds",
    )  # fmt: skip
    add("--report-every", type=int, default=50, metavar="STEPS", help="(default %(default)s)")
    add(
        "--look-every", type=int, default=None, metavar="STEPS",
        help="held-out loss and a grid of edits (default: the recipe's checkpoint_every; 0: never)",
    )  # fmt: skip
    add(
        "--export-dtype", choices=EXPORT_DTYPES, default=EXPORT_DTYPES[0],
        help="of the edit model's files; float16 halves them (default %(default)s)",
    )  # fmt: skip
    add("--report-to", default="tensorboard", help="tensorboard, wandb, mlflow, … or none (default %(default)s)")
    add_output_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    return ended(run, args, NEEDED_GIB.get(args.recipe, 0.0))


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    recipe = load_training_recipe(args.recipe, args.set)
    work = prepared(args, recipe)
    folder = open_folder(work.output)
    done = json.loads(folder.read(SUMMARY)) if folder.exists(SUMMARY) else {}
    if done.get("step") == recipe.steps:
        if done.get("model") == wanted_model(args, recipe) and folder.exists(f"{MODEL}/manifest.json"):
            print(f"{work.output}: already trained to step {recipe.steps}; see {work.output}/{MODEL}", file=sys.stderr)
            return 0
        return finish(args, work, folder, done["seconds"])
    from ip2p.training.sharding import check_shards
    from jobs._ray import connect
    from jobs._ray_train import describe, team_of, threads_of

    connect()
    team = team_of(args.workers, args.gpus_per_worker)
    if work.shard:
        check_shards(recipe.global_batch, team.workers)
    work = dataclasses.replace(work, threads=args.threads or threads_of(team))
    with Progress(recipe.steps, "steps", 0, args.quiet, args.json) as progress:
        progress.say(f"train {_pairs(work, 'train')} pairs, look at {_pairs(work, 'val')}; {describe(team)}")
        if work.cache:
            encode(work, team, progress)
        follow(args, work, team, progress)
    return finish(args, work, folder, time.monotonic() - started)


def prepared(args: argparse.Namespace, recipe: TrainingRecipe) -> Work:
    """Everything that can be refused is refused here, before a cluster is joined. Folders become absolute: workers do
    not run where we do."""
    from ip2p.models.preflight import check_base
    from ip2p.training.latent_cache import cache_identity
    from ip2p.training.lora import check_peft
    from jobs._ray_train import Work
    from jobs._trackers import wanted_trackers

    wanted_trackers(args.report_to)
    if args.report_every < 1 or (args.look_every or 0) < 0 or args.threads < 0:
        raise InputError("--report-every is at least 1 step, --look-every and --threads at least 0")
    if args.shard and recipe.lora_rank:
        raise InputError("--shard and lora_rank exclude each other; low-rank additions fit on one GPU")
    if args.shard and recipe.optimizer == "muon":
        raise InputError("--shard and optimizer=muon exclude each other; it moves whole matrices: use optimizer=adamw")
    if recipe.lora_rank:
        check_peft()
    output, runs = located(args.output), [located(uri) for uri in args.pairs]
    weights = check_base(recipe.base, recipe.resolution)
    recipe = dataclasses.replace(recipe, base=located_model(recipe.base))
    splits = listed(runs)
    identity = cache_identity(splits, weights, recipe.resolution, mirrored=recipe.flip > 0)
    about = {**weights, **{f"pairs_{split}": id_ for split, id_ in identity.pairs.items()}}
    claim_folder(open_folder(output), recipe, about)
    cache = "" if args.cache_latents is None else located(args.cache_latents or f"{output}/cache")
    look_every = recipe.checkpoint_every if args.look_every is None else args.look_every
    return Work(
        recipe, output, splits, about, cache, identity, gradient_checkpointing=args.gradient_checkpointing,
        shard=args.shard, report_every=args.report_every, look_every=look_every,
    )  # fmt: skip


def listed(runs: Sequence[str]) -> dict[str, typing.Any]:
    """Shards of the train split, and of val where there are any. Raises DatasetError where nothing can be trained."""
    from ip2p.training.pair_index import list_splits, no_pairs

    found = list_splits(runs)
    if not found["train"]:
        raise no_pairs(runs, "train")
    if not found["val"]:
        print("warning: the val split has no pair; nothing will be looked at while training", file=sys.stderr)
    return {split: found[split] for split in ("train", "val") if found[split]}


def claim_folder(folder: Folder, recipe: TrainingRecipe, about: dict[str, str]) -> None:
    """Write ``recipe.json`` and ``about.json``; raise InputError where the folder holds a training of other things."""
    from ip2p.training.state import MAY_CHANGE

    check_ours(folder, "about.json", "recipe.json", "manifest.json", SUMMARY)
    if folder.exists("about.json"):
        there = training_recipe_from_json(folder.read("recipe.json").decode())
        was = dataclasses.asdict(there) | json.loads(folder.read("about.json"))
        now = dataclasses.asdict(recipe) | about
        changed = [name for name in now if name not in MAY_CHANGE and was.get(name) != now[name]]
        if changed:
            differences = ", ".join(f"{name} is {was.get(name)!r} there and {now[name]!r} here" for name in changed)
            raise InputError(
                f"{folder.uri}: holds a training of something else ({differences}); choose another --output, "
                "or pass the same --recipe, --set and --pairs"
            )
    folder.write("recipe.json", recipe.to_json().encode())
    folder.write("about.json", (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())


def wanted_model(args: argparse.Namespace, recipe: TrainingRecipe) -> dict[str, typing.Any]:
    """What of the exported model does not come from training it."""
    scales = {name: getattr(recipe, name) for name in ("guidance_scale", "image_guidance_scale")}
    return {"dtype": args.export_dtype, **scales}


def encode(work: Work, team: Team, progress: Progress) -> None:
    """Make the latent cache, or what is missing of it."""
    from ip2p.models.components import load_base
    from ip2p.training.encoding import PairEncoder
    from ip2p.training.latent_cache import finish_cache, is_finished, planned_parts
    from jobs._ray_train import encode_parts

    assert work.identity is not None
    folder = open_folder(work.cache)
    if is_finished(folder, work.identity):
        return
    parts = planned_parts(work.splits)
    done: list[str] = []

    def told(name: str) -> None:
        done.append(name)
        progress.say(f"latent cache: {len(done)} of {len(parts)} parts")

    files = encode_parts(work, parts, team, told)
    model = load_base(work.recipe.base, "cpu")
    finish_cache(folder, work.identity, files, PairEncoder(model.vae, model.text_encoder, model.tokenizer))


def follow(args: argparse.Namespace, work: Work, team: Team, progress: Progress) -> None:
    """Train, showing what is heard."""
    from jobs._ray_train import train_on_cluster
    from jobs._trackers import Trackers

    with Trackers(args.report_to, open_folder(work.output), work.recipe) as trackers:

        def heard(kind: str, content: typing.Any) -> None:
            if kind == "note":
                progress.say(content)
            elif kind == "begun":
                progress.say(f"from step {content['step']}, {content['workers']} workers")
                progress.at(content["step"])
            else:
                trackers.log(content)
                shown = {"loss": round(content["loss"], 4), "samples_per_s": round(content["samples_per_s"])}
                held_out = {"held_out_loss": round(content["held_out_loss"], 4)} if "held_out_loss" in content else {}
                progress.at(content["step"], **shown, **held_out)

        train_on_cluster(work, team, f"start-{time.time_ns()}", heard)


def finish(args: argparse.Namespace, work: Work, folder: Folder, seconds: float) -> int:
    """Export the averaged weights, then write ``summary.json``, which says that the training is finished."""
    from jobs._ray_train import read_metrics

    export(work, folder, args.export_dtype)
    remove_all(folder, "ray/")  # Ray Train's notes on its own starts
    metrics = read_metrics(folder)
    last = metrics[-1] if metrics else {}
    summary = {
        "step": work.recipe.steps, "pairs": _pairs(work, "train"), "seconds": round(seconds, 1),
        **{name: last.get(name) for name in ("loss", "held_out_loss", "samples_per_s")},
        "model": wanted_model(args, work.recipe),
    }  # fmt: skip
    folder.write(SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    print(json.dumps(summary) if args.json else f"edit model: {work.output}/{MODEL}")
    return 0


def export(work: Work, folder: Folder, dtype: str) -> None:
    """The edit model of the last checkpoint as ``model/``, by its averaged weights."""
    from ip2p.models.components import load_base
    from ip2p.models.export import save_edit_model
    from ip2p.training.checkpoints import latest_whole
    from ip2p.training.edit_model import trained_edit_model

    last = latest_whole(open_folder(f"{work.output}/checkpoints"), groups=("ema",))
    if last is None or last.step != work.recipe.steps:
        found = "none" if last is None else f"that of step {last.step}"
        raise JobError(
            f"{work.output}/checkpoints: the newest whole one is {found}, not that of step {work.recipe.steps}; "
            "run the same command again, and see that --output is on storage that the workers share"
        )
    remove_all(folder, f"{MODEL}/")
    model = trained_edit_model(load_base(work.recipe.base, "cpu"), last.tensors["ema"], work.recipe)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / MODEL
        save_edit_model(model, made, {"made_by": "jobs/train.py", "step": last.step, **work.about}, dtype)
        files = [path for path in made.rglob("*") if path.is_file()]
        # The manifest last: it says that the folder is whole.
        for path in sorted(files, key=lambda path: path == made / "manifest.json"):
            folder.write(f"{MODEL}/{path.relative_to(made)}", path.read_bytes())


def _pairs(work: Work, split: str) -> int:
    from ip2p.training.pair_index import count_rows

    return count_rows(work.splits.get(split, []))


if __name__ == "__main__":
    sys.exit(main())
