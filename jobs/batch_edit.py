#!/usr/bin/env python3
"""Edit many pictures, each once, whatever is killed on the way.

    python jobs/batch_edit.py --manifest s3://bucket/edits.jsonl --output s3://bucket/edited
    python jobs/batch_edit.py --prefix s3://bucket/photos --instruction "make it night" --output out/night
    ray job submit --working-dir . -- python jobs/batch_edit.py --manifest s3://… --output s3://… --workers 1:16

A manifest is .jsonl, .csv or .parquet with the fields image, instruction and, if wanted, id, output, mask, seed, steps,
guidance_scale, image_guidance_scale, negative_prompt, sampler, resolution, size, restore_size, output_format; or the
lines of OpenAI's batch format. The same command run again goes on where it stopped; what has its result is not done
again, and changed lines are. Exit code 0: all done; 3: finished, but some lines were rejected or failed (failed.jsonl
can be a manifest again); 1: stopped by an error.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import secrets
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ip2p.batch.places import JOB, PROBE, SHEET, STATUS, SUMMARY
from ip2p.errors import InputError, JobError, StorageError
from ip2p.storage import Folder, open_folder
from jobs._command import add_output_flags, ended, located, size_range
from jobs._progress import Progress

if typing.TYPE_CHECKING:
    from ip2p.batch.chunk_worker import ChunkDone
    from ip2p.batch.manifest import Source
    from ip2p.batch.records import Records
    from ip2p.batch.report import Durations, Usage
    from jobs._ray_batch import Chunk, Pool, WorkerSetup

T = typing.TypeVar("T")
STATUS_EVERY_S = 5.0
FAILURES_COUNT_FROM = 200  # items, before a rate of failures says anything
SAID_LINES = 10


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--manifest", metavar="FILE", help=".jsonl .csv .parquet, or OpenAI's batch .jsonl; local or s3")
    given.add_argument("--prefix", metavar="FOLDER", help="edit every PNG, JPEG and WebP below it; local or s3://")
    add("--instruction", default="", metavar="TEXT", help="of lines that have none, or of all pictures of --prefix")
    add("--output", required=True, metavar="FOLDER", help="where results go, local or s3://bucket/prefix")
    add("--ckpt", default="embedded", metavar="DIR", help="diffusers folder (default: the shipped model)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the UNet (%(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="steps=50, seed=7, …: of lines without it")
    add("--ignore", nargs="+", default=[], metavar="FIELD", help="fields of the manifest that are not looked at")
    add("--allow", nargs="+", default=[], metavar="PREFIX", help="pictures may only be read below these places")
    add("--strict", action="store_true", help="stop if any line of the manifest is rejected")
    add("--dry-run", action="store_true", help="check the manifest and say what would be done")
    add("--retry-failed", action="store_true", help="try again what failed for good in an earlier run")
    add("--workers", type=size_range, metavar="N or MIN:MAX", help="editing actors (default 1:cores or 1:GPUs)")
    add("--gpus-per-worker", type=float, help="default 1 where the cluster has GPUs, else 0")
    add("--deadline", type=duration, metavar="TIME", help="90s, 45m, 2h: as few workers as meet it (default: the most)")
    add(
        "--rows-per-call", type=int, default=24, help="UNet rows of every call; decides last bits (default %(default)s)"
    )
    add("--chunk", type=int, default=64, metavar="ITEMS", help="items of one record file (default %(default)s)")
    add("--max-failure-rate", type=float, default=1.0, metavar="SHARE", help="stop above it, 0..1 (default: never)")
    add("--max-pixels", type=int, default=16_000_000, help="of a picture that is read (default %(default)s)")
    add("--outage", type=duration, default=600.0, metavar="TIME", help="how long to wait for a store (default 10m)")
    add("--price-per-hour", type=float, default=0.0, help="of one worker's device, for the cost in summary.json")
    add("--via-serve", default="", metavar="URL", help="let this `ip2p serve` edit (key: IP2P_API_KEY)")
    add("--copy", action="store_true", help="edit nothing: what a batch costs beside the edits")
    add("--sheet", metavar="FILE", help="put the contact sheet here too")
    add_output_flags(parser)
    return parser.parse_args(argv)


def duration(text: str) -> float:
    """``90``, ``90s``, ``45m`` or ``2h`` in seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise argparse.ArgumentTypeError(f"wants a time like 90s, 45m or 2h, got {text!r}")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    return ended(run, arguments(argv))


@dataclass
class Batch:
    """A submission of a job: what it is to do and what has come of it."""

    args: argparse.Namespace
    source: Source
    folder: Folder
    model: str
    openai: bool
    records: Records
    attempts: dict[str, int]
    durations: Durations
    usage: Usage
    lines: int = 0
    rejected: int = 0
    done_before: int = 0
    failed_before: int = 0
    done: int = 0
    found: int = 0  # of the done ones: were written by a run that was stopped
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    fence: int = 0  # how many submissions there were, and this one

    @property
    def look_first(self) -> bool:
        """Whether outputs may be there that have no record, of a run that was stopped."""
        return self.fence > 1

    @property
    def todo(self) -> int:
        again = 0 if self.args.retry_failed else self.failed_before
        return self.lines - self.rejected - self.done_before - again

    def counts(self) -> dict[str, typing.Any]:
        """Of the whole job, as it stands."""
        failed = self.failed + (0 if self.args.retry_failed else self.failed_before)
        done = self.done_before + self.done
        waiting = self.lines - self.rejected - done - failed
        return {"lines": self.lines, "done": done, "failed": failed, "rejected": self.rejected, "waiting": waiting}


def run(args: argparse.Namespace) -> int:
    from ip2p.batch.lease import Lease
    from ip2p.batch.manifest import kept
    from ip2p.batch.records import Records

    started = time.monotonic()
    asked, folder, model = checked(args)
    with Records() as records, tempfile.TemporaryDirectory(prefix="ip2p-batch-") as place:
        source = patiently(args, lambda: kept(asked, Path(place)))
        batch = planned(args, source, folder, model, records)
        if args.dry_run:
            print(json.dumps(batch.counts()) if args.json else f"{batch.lines} lines, {batch.rejected} rejected")
            return 3 if batch.rejected else 0
        lease = Lease(folder)
        patiently(args, lambda: probe(folder))
        patiently(args, lambda: lease.acquire(lambda text: print(text, file=sys.stderr, flush=True)))
        try:
            patiently(args, lambda: take_up(batch, lease.fence))
            if batch.todo:
                work_on(batch, lease)
            return patiently(args, lambda: finish(batch, time.monotonic() - started))
        finally:
            with contextlib.suppress(StorageError):
                lease.release()


def patiently(args: argparse.Namespace, action: Callable[[], T]) -> T:
    """``action``, again while the store is away."""
    from ip2p.batch.failures import through_outages

    return through_outages(action, args.outage)


def checked(args: argparse.Namespace) -> tuple[Source, Folder, str]:
    """Everything that can be refused before the manifest is read; the last is the id of what edits."""
    from ip2p.batch.editing import check_address, model_id
    from ip2p.batch.item import SETTINGS, EditSettings, Item, item_of
    from ip2p.batch.manifest import Source
    from ip2p.models.preflight import check_edit_model

    if args.prefix and not args.instruction:
        raise InputError("--prefix needs --instruction, what to do with all of its pictures")
    if args.rows_per_call < 3 or args.chunk < 1:
        raise InputError("--rows-per-call is at least 3 (an edit's rows), --chunk at least 1")
    if args.via_serve and args.copy:
        raise InputError("--via-serve and --copy exclude each other")
    if args.via_serve:
        check_address(args.via_serve)
    fields: dict[str, object] = {}
    for one in args.set:
        name, equals, value = one.partition("=")
        if not equals or name not in SETTINGS:
            raise InputError(f"--set {one}: expected FIELD=VALUE with one of {', '.join(SETTINGS)}")
        fields[name] = value
    fields |= {"image": "x", "instruction": args.instruction or "x"}
    common = item_of(fields, 0, Item(0, "", "", "", "", EditSettings()))
    if args.via_serve or args.copy:
        ids = {"server": args.via_serve} if args.via_serve else {"copy": ""}
    else:
        ids = check_edit_model(args.ckpt)
    args.output = located(args.output)
    uri = located(args.prefix or args.manifest)
    if args.prefix and f"{args.output.rstrip('/')}/".startswith(f"{uri.rstrip('/')}/"):
        raise InputError("--output lies below --prefix, so that results would be edited again; choose another")
    instruction = common.instruction if args.instruction else ""
    source = Source(uri, bool(args.prefix), common.settings, instruction, tuple(args.ignore))
    return source, open_folder(args.output), model_id(ids, args.dtype, args.rows_per_call)


def planned(args: argparse.Namespace, source: Source, folder: Folder, model: str, records: Records) -> Batch:
    """Read the whole manifest once, before anything is loaded, and say which lines cannot be used."""
    from ip2p.batch.manifest import Rejected, answers_openai, entries
    from ip2p.batch.report import Durations, Usage

    batch = Batch(args, source, folder, model, answers_openai(source), records, {}, Durations(), Usage())
    for entry in entries(source):
        batch.lines += 1
        if isinstance(entry, Rejected):
            batch.rejected += 1
            if batch.rejected <= SAID_LINES:
                print(f"warning: {source.uri}, line {entry.line}: {entry.message}; left out", file=sys.stderr)
    if batch.rejected > SAID_LINES:
        print(f"warning: {batch.rejected} lines left out in all; see rejected.jsonl", file=sys.stderr)
    if batch.rejected and args.strict:
        raise InputError(f"{source.uri}: {batch.rejected} lines cannot be used; mend them, or leave out --strict")
    if not batch.lines and not source.is_prefix:
        raise InputError(f"{source.uri}: the file is empty; it needs at least one line")
    return batch


def probe(folder: Folder) -> None:
    """Raise InputError where the store writes over what a condition protects: each output once could not be kept."""
    name, mine = f"{PROBE}-{secrets.token_hex(8)}", secrets.token_bytes(8)
    try:
        # A write whose answer was lost is told as refused when it is tried again.
        first = folder.write_if(name, mine) is not None or folder.read(name) == mine
        if not first or folder.write_if(name, b"other") is not None:
            raise InputError(
                f"{folder.uri}: this store does not honour conditional writes (If-None-Match), so two submissions "
                "could overwrite each other; use one that does, or a local folder"
            )
    finally:
        with contextlib.suppress(StorageError):
            folder.delete(name)


def take_up(batch: Batch, fence: int) -> None:
    """Find out what earlier runs have done."""
    from ip2p.batch.attempts import load_attempts
    from ip2p.batch.item import Item
    from ip2p.batch.manifest import entries
    from ip2p.batch.records import DONE, FAILED

    batch.records.load(batch.folder)
    batch.attempts = load_attempts(batch.folder)
    batch.fence = fence
    batch.done_before = batch.failed_before = 0
    for entry in entries(batch.source):
        if isinstance(entry, Item):
            status = batch.records.status(entry.key(batch.model))
            batch.done_before += status == DONE
            batch.failed_before += status == FAILED
    about = {"source": batch.source.uri, "model": batch.model, "fence": fence, "arguments": sys.argv[1:]}
    batch.folder.write(JOB, (json.dumps({**about, "started_at": int(time.time())}, indent=1) + "\n").encode())


def chunks_of(batch: Batch) -> Iterator[Chunk]:
    """Items without a record, in the manifest's order; one that has been tried in vain goes by itself."""
    from ip2p.batch.item import Item
    from ip2p.batch.manifest import entries
    from ip2p.batch.records import DONE
    from jobs._ray_batch import Chunk

    def waiting() -> Iterator[Item]:
        for entry in entries(batch.source):
            if isinstance(entry, Item):
                status = batch.records.status(entry.key(batch.model))
                if not status or (status != DONE and batch.args.retry_failed):
                    yield entry

    todo = waiting()
    while items := list(itertools.islice(todo, batch.args.chunk)):
        tried = {} if batch.args.retry_failed else batch.attempts
        before = [tried.get(item.key(batch.model), 0) for item in items]
        fresh = [item for item, count in zip(items, before, strict=True) if not count]
        if fresh:
            yield Chunk(fresh, [0] * len(fresh), batch.look_first)
        for item, count in zip(items, before, strict=True):
            if count:
                yield Chunk([item], [count], batch.look_first, suspect=True)


def work_on(batch: Batch, lease: typing.Any) -> None:
    """Edit what is left. Raises the Ip2pError that stops the job; what is done by then stays."""
    from jobs._ray import connect

    connect()
    from jobs._ray_batch import Pool

    args = batch.args
    setup, size, cpus, gpus = placed(args, batch.model, lease.fence)
    began = time.monotonic()
    told = 0.0
    with Progress(batch.lines - batch.rejected, "edits", batch.lines - batch.rejected - batch.todo, args.quiet,
                  args.json) as progress:  # fmt: skip
        sizes = f"{size[0]}..{size[1]}" if size[0] != size[1] else str(size[0])
        progress.say(
            f"{batch.todo} edits to do; {sizes} workers of {f'{gpus:g} GPU' if gpus else f'{cpus:g} CPU'} each"
        )
        wanted = Wanted(batch, size, began)
        pool = Pool(setup, size, cpus, gpus, wanted, lambda members, ready: tell_pool(batch, began, members, ready))
        try:
            for done in pool.run(chunks_of(batch)):
                lease.check()
                add(batch, done)
                if done.done or done.failed:
                    progress.tell(done.done + done.failed, failed=batch.failed, workers=len(pool.members))
                check_failures(batch)
                if time.monotonic() - told > STATUS_EVERY_S:
                    told = time.monotonic()
                    write_status(batch, pool, progress.eta_s())
        finally:
            batch.usage.device_seconds, batch.usage.row_evals = pool.worker_seconds(), pool.row_evals


class Wanted:
    """How many workers would be right: all that may be, or as few as meet the deadline."""

    def __init__(self, batch: Batch, size: tuple[int, int], began: float):
        self.batch, self.size, self.began = batch, size, began

    def __call__(self, worker_seconds: float) -> int:
        deadline_s, batch = self.batch.args.deadline, self.batch
        done = batch.done + batch.failed
        if deadline_s is None or not done:
            return self.size[1] if deadline_s is None else self.size[0]
        needed_s = (batch.todo - done) * worker_seconds / done
        left_s = max(1.0, deadline_s - (time.monotonic() - self.began))
        return math.ceil(needed_s / left_s)


def placed(args: argparse.Namespace, model: str, fence: int) -> tuple[WorkerSetup, tuple[int, int], float, float]:
    """What workers are told, how many there may be, and what each takes of the cluster."""
    import ray

    from jobs._ray import device_of
    from jobs._ray_batch import WorkerSetup

    resources = ray.cluster_resources()
    there, cores = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    light = bool(args.via_serve or args.copy)
    gpus = (args.gpus_per_worker if args.gpus_per_worker is not None else float(there > 0)) if not light else 0.0
    if gpus and not there and not args.workers:
        raise InputError("--gpus-per-worker asks for GPUs, but this cluster has none; leave it out")
    size = args.workers or (1, max(1, int(there / gpus)) if gpus else cores)
    setup = WorkerSetup(
        args.output, model, args.ckpt, args.dtype, args.rows_per_call, args.via_serve,
        os.environ.get("IP2P_API_KEY", ""), args.copy, device_of(gpus),
        # One thread on a CPU: the order of arithmetic then never depends on how many cores a machine has.
        threads=0 if gpus else 1, fence=fence,
        max_pixels=args.max_pixels, outage_s=args.outage, allowed=tuple(map(located, args.allow)),
    )  # fmt: skip
    return setup, size, 1.0, gpus


def add(batch: Batch, done: ChunkDone) -> None:
    batch.done += done.done
    batch.found += done.skipped
    batch.failed += done.failed
    batch.durations.add(done.edit_s)
    for code, count in done.reasons.items():
        batch.reasons[code] = batch.reasons.get(code, 0) + count


def check_failures(batch: Batch) -> None:
    ended_ = batch.done + batch.failed
    share = batch.failed / max(1, ended_)
    if ended_ >= min(FAILURES_COUNT_FROM, batch.todo) and share > batch.args.max_failure_rate:
        raise JobError(
            f"{batch.failed} of {ended_} edits failed ({batch.reasons}), more than --max-failure-rate "
            f"{batch.args.max_failure_rate:g}; what is done stays"
        )


def write_status(batch: Batch, pool: Pool, eta_s: float | None) -> None:
    """For `ip2p batch-edit status`; the job does without where the store is away."""
    now = {**batch.counts(), "eta_s": eta_s and round(eta_s), "workers": len(pool.members), "reasons": batch.reasons}
    with contextlib.suppress(StorageError):
        batch.folder.write(STATUS, json.dumps({**now, "row_evals": pool.row_evals, "at": int(time.time())}).encode())


def tell_pool(batch: Batch, began: float, members: int, ready: int) -> None:
    if batch.args.json:
        told = {"pool": members, "ready": ready, "at_s": round(time.monotonic() - began, 1)}
        print(json.dumps(told), file=sys.stderr, flush=True)


def finish(batch: Batch, seconds: float) -> int:
    """Write the reports (summary last: it says that the run is finished), and say what came of it."""
    from ip2p.batch.report import contact_sheet, lines_of, write_lines

    folder = batch.folder
    batch.records.load(folder)
    write_lines(folder, lines_of(batch.source, batch.model, batch.records), batch.openai)
    sheet = contact_sheet(folder, lines_of(batch.source, batch.model, batch.records))
    if sheet is not None:
        folder.write(SHEET, sheet)
        if batch.args.sheet:
            open_folder(str(Path(batch.args.sheet).parent)).write(Path(batch.args.sheet).name, sheet)
    batch.usage.seconds = round(seconds, 1)
    summary = {**batch.counts(), "submission": batch.fence, **usage_of(batch)}
    folder.write(SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    folder.write(STATUS, json.dumps({**batch.counts(), "eta_s": 0, "workers": 0, "at": int(time.time())}).encode())
    if batch.args.json:
        print(json.dumps(summary))
    else:
        say(batch, summary)
    return 3 if summary["failed"] or summary["rejected"] else 0


def usage_of(batch: Batch) -> dict[str, typing.Any]:
    """Of this run, not of those before it."""
    usage, edited = batch.usage, batch.done - batch.found
    return {
        "this_run": {
            "edited": edited, "found": batch.found, "failed": batch.failed, "reasons": batch.reasons,
            "seconds": usage.seconds, "edit_s_p50": batch.durations.percentile(0.5),
            "edit_s_p95": batch.durations.percentile(0.95), "row_evals": usage.row_evals,
            "device_seconds": round(usage.device_seconds, 1), "cost": usage.cost(batch.args.price_per_hour),
        }
    }  # fmt: skip


def say(batch: Batch, summary: dict[str, typing.Any]) -> None:
    if not summary["lines"]:
        print("0 images: nothing to do")
        return
    mine = summary["this_run"]
    print(
        f"{summary['done']} of {summary['lines']} done ({mine['edited']} now), {summary['failed']} failed, "
        f"{summary['rejected']} lines rejected, {mine['seconds']} s"
    )
    if summary["failed"]:
        print(f"failed: {batch.folder.uri}/failed.jsonl says why; --retry-failed tries again")
    print(f"results: {batch.folder.uri}/results.jsonl, contact sheet: {batch.folder.uri}/contact_sheet.png")


if __name__ == "__main__":
    sys.exit(main())
