"""``jobs/datagen.py --stage triplets``: captions to a file of triplets, without painting anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import typing
from collections.abc import Iterator, Sequence

from ip2p.config import Recipe, load_recipe, overridden
from ip2p.errors import InputError
from ip2p.storage import Folder, open_folder
from jobs._command import check_ours, located
from jobs._progress import Progress

if typing.TYPE_CHECKING:
    from ip2p.config import Placement
    from ip2p.dataset.shards import Shard
    from ip2p.triplets.assembly import Pacing
    from ip2p.triplets.captions import CaptionFile, CaptionRow
    from ip2p.triplets.writing import WritingRun

ENGINES = ("auto", "transformers", "vllm")
SECTION = "writing."
NOTE = "triplet_run.json"
# The flags of this stage alone; None stands for a flag that was not given, so that other stages can refuse it.
DEFAULTS: dict[str, typing.Any] = {
    "engine": "auto", "max_cost": math.inf, "requests_per_minute": 0.0, "concurrency": 8, "timeout": 60.0
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``DEFAULTS``."""
    group = parser.add_argument_group("--stage triplets", "write triplets only; --set writing.FIELD=VALUE says how")
    add = group.add_argument
    add("--engine", choices=ENGINES, help="of a language model (default auto: vllm where it and GPUs are)")
    add("--max-cost", type=float, help="of all requests together, by writing.*_price (no cap)")
    add("--requests-per-minute", type=float, help="to the server (as fast as it answers)")
    add("--concurrency", type=int, help=f"requests under way at a time (default {DEFAULTS['concurrency']})")
    add("--timeout", type=float, metavar="S", help=f"for one answer (default {DEFAULTS['timeout']:g})")


def check_no_flags(args: argparse.Namespace) -> None:
    """Raise InputError where a flag of this stage was given to another, which would not heed it."""
    given = [f"--{name.replace('_', '-')}" for name in DEFAULTS if getattr(args, name) is not None]
    if given:
        raise InputError(
            f"{', '.join(given)}: heeded by --stage triplets alone; write the triplets with it first, then paint them "
            "with --triplets FILE"
        )


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """``args`` with the flags of this stage that were not given."""
    return argparse.Namespace(
        **{name: DEFAULTS.get(name) if value is None else value for name, value in vars(args).items()}
    )


def write_triplets(
    args: argparse.Namespace, read_input: typing.Callable[[argparse.Namespace, Recipe], CaptionFile]
) -> int:
    """Write what is not written yet, then bring it together; the exit code."""
    started = time.monotonic()
    args = with_defaults(args)
    run, pacing = prepared(args)
    folder = open_folder(located(args.output))
    captions = with_places(read_input(args, run.recipe), args.captions)
    claim_folder(folder, run)
    shards = take_up(run, folder, captions.rows, args.retry_errors)
    if shards:
        work(args, run, pacing, folder, shards, len(captions.rows))
    return finish(args, run, folder, len(captions.bad), time.monotonic() - started)


def with_places(captions: CaptionFile, file: str) -> CaptionFile:
    """``captions`` of ``file`` with urls that are beside it made absolute: what is written here lies elsewhere."""
    from ip2p.triplets.captions import beside, is_relative

    def placed(row: CaptionRow) -> CaptionRow:
        return dataclasses.replace(row, url=beside(located(file), row.url)) if is_relative(row.url) else row

    return dataclasses.replace(captions, rows=[placed(row) for row in captions.rows])


def prepared(args: argparse.Namespace) -> tuple[WritingRun, Pacing]:
    """The run and its pacing; everything that can be refused is refused here, before a cluster is joined."""
    from ip2p.triplets.assembly import Pacing, default_writing
    from ip2p.triplets.writing import WritingRun, check_writing

    if args.triplets:
        raise InputError("--stage triplets writes triplets; --triplets brings them, for painting")
    if args.redo_changed:
        raise InputError("--redo-changed is for shards of pairs; what --stage triplets has written it never makes anew")
    if args.painters is not None or args.painter_gpus:  # 0 is true of this stage, and says not to look for GPUs
        raise InputError(
            "--painters and --painter-gpus: nothing is painted here; --writers, --writer-gpus say how many"
        )
    recipe = load_recipe(args.recipe, [override for override in args.set if not override.startswith(SECTION)])
    own = [override.removeprefix(SECTION) for override in args.set if override.startswith(SECTION)]
    writing = overridden(default_writing(recipe), own)
    check_writing(writing)
    if recipe.triplets.writer == "given":
        raise InputError("--stage triplets needs a writer: --set triplets.writer=lm or http")
    if recipe.triplets.writer == "http" and writing.judge not in ("", "http"):
        raise InputError("writing.judge is http (the writer's server) or empty where triplets.writer is http")
    if args.concurrency < 1 or args.max_cost < 0 or args.requests_per_minute < 0 or args.timeout <= 0:
        raise InputError(
            "--concurrency wants at least 1, --max-cost and --requests-per-minute 0, --timeout more than 0"
        )
    if args.max_cost < math.inf and not (writing.prompt_price or writing.completion_price):
        raise InputError("--max-cost needs prices: --set writing.prompt_price=P --set writing.completion_price=P")
    return WritingRun(recipe, writing), Pacing(
        args.max_cost, args.requests_per_minute, args.concurrency, args.timeout
    )  # fmt: skip


def claim_folder(folder: Folder, run: WritingRun) -> None:
    """Write ``triplet_run.json``; raise InputError where the folder holds another run."""
    check_ours(folder, NOTE, "recipe.json", "manifest.json")
    if folder.exists(NOTE):
        there, here = (json.loads(text) for text in (folder.read(NOTE).decode(), run.to_json()))
        changed = [name for name in here if there.get(name) != here[name]]
        if changed:
            raise InputError(
                f"{folder.uri}: holds a run with another {', '.join(changed)} (see its {NOTE}); choose "
                "another --output, or pass the same --recipe and --set"
            )
    folder.write(NOTE, run.to_json().encode())


def take_up(run: WritingRun, folder: Folder, captions: Sequence[CaptionRow], retry_errors: bool) -> list[Shard]:
    """The shards that are left of ``captions``; the folder is ready for them then."""
    from ip2p.triplets.written import SUMMARY, finished_captions, plan, read_rows, without_errors

    rows = read_rows(folder, ())
    done = finished_captions(rows, run.writing.per_caption, retry_errors)
    clear_answers(run, folder, without_errors(rows) & done)
    shards = plan(captions, run.writing, done)
    if shards:
        folder.delete(SUMMARY)  # it says that the run is finished
    return shards


def clear_answers(run: WritingRun, folder: Folder, done: set[str]) -> None:
    """Delete what a run left that was killed between a part and its clearing up."""
    from ip2p.triplets.answers import Answers

    if run.recipe.triplets.writer == "http":
        Answers(folder).forget_all_of(done.__contains__)


def work(
    args: argparse.Namespace, run: WritingRun, pacing: Pacing, folder: Folder, shards: Sequence[Shard], captions: int
) -> None:
    """Write ``shards``, showing progress. Raises JobError at the end if some failed."""
    from jobs._ray import connect, default_placement, good_shards, waits_for

    connect()
    wanted = {"lm_actors": args.writers, "lm_gpus": args.writer_gpus}
    placement = default_placement(**{name: value for name, value in wanted.items() if value is not None})
    left = sum(len(shard.rows) for shard in shards)
    accepted, cost = 0, 0.0
    with Progress(captions, "captions", captions - left, args.quiet, args.json) as progress:
        if missing := waits_for(placement):
            progress.say(missing)
        for done in good_shards(_written(args, run, pacing, placement, folder, shards), progress.say):
            accepted, cost = accepted + done.accepted, cost + done.cost
            progress.tell(done.captions, triplets=accepted, **({"cost": round(cost, 4)} if cost else {}))


def _written(
    args: argparse.Namespace, run: WritingRun, pacing: Pacing, placement: Placement, folder: Folder,
    shards: Sequence[Shard],
) -> Iterator[typing.Any]:  # fmt: skip
    from jobs._ray_triplets import write_shards, write_shards_by_vllm

    if run.recipe.triplets.writer == "lm" and engine_of(args.engine, placement) == "vllm":
        return write_shards_by_vllm(shards, run, placement, folder.uri)
    return write_shards(shards, run, pacing, placement, folder.uri)


def engine_of(asked: str, placement: Placement) -> str:
    """What runs a language model; InputError for vllm without GPUs."""
    import importlib.util

    if asked == "vllm" and not placement.lm_gpus:
        raise InputError("--engine vllm needs GPUs for the writers; leave it out to use transformers on the CPU")
    if asked == "auto":
        return "vllm" if placement.lm_gpus and importlib.util.find_spec("vllm") else "transformers"
    return asked


def finish(args: argparse.Namespace, run: WritingRun, folder: Folder, bad_rows: int, seconds: float) -> int:
    """Bring the parts together and report. 3: some rows could not be used or asked for, or nothing was accepted."""
    from ip2p.triplets import written

    summary = {**written.finish(folder, run.writing, seconds), "bad_input_rows": bad_rows}
    if args.json:
        print(json.dumps(summary))
    else:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["by_reason"].items())
        print(f"{summary['triplets']} triplets of {summary['captions']} captions: {folder.uri}/{written.TRIPLETS}")
        print(f"{summary['asked_for']} asked for: {reasons}; cost {summary['cost']:g}; {summary['seconds']} s")
    failed = sum(summary["by_reason"].get(reason, 0) for reason in ("writer_failed", "over_budget"))
    if failed:
        print(f"error: {failed} rows got no answer, see {written.REFUSED}; --retry-errors asks again", file=sys.stderr)
    return 3 if failed or bad_rows or not summary["triplets"] else 0
