"""The unit of commit: a shard of prompts that is worked on together and appears in the run folder whole or not at all.

A shard is chosen by the captions' order alone, so that the same captions give the same shards on any cluster. Its
files are written in the order pairs, ledger, stats; the small stats file is the commit mark, and all that resuming
and summing up ever read. This file knows no Ray and paints nothing.
"""

from __future__ import annotations

import collections
import itertools
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ip2p.config import Recipe
from ip2p.dataset.manifest import MANIFEST, FileEntry
from ip2p.dataset.run_folder import shard_name, write_shard
from ip2p.dataset.tables import image_cell, ledger_record
from ip2p.errors import InputError
from ip2p.images import decode_image
from ip2p.schema import Candidate, LedgerRow, Triplet
from ip2p.seeds import stable_id
from ip2p.storage import Folder, sha256
from ip2p.triplets.captions import CaptionRow

Batch = dict[str, typing.Any]
WEIGHTS = ("unet_sha256", "vae_sha256", "text_encoder_sha256", "clip_sha256")
# Finished shards of other captions that are made anew unasked: mended rows, and a last shard that grew. A caption put
# in or taken out moves all that follow, and would cost their pictures.
CHANGED_SHARE = 0.02
CHANGED_AT_LEAST = 2  # of small runs


@dataclass(frozen=True)
class Shard:
    """Some rows of the input under the name that their files will have (``part-00000-<hash8>``)."""

    name: str
    rows: Sequence[CaptionRow]


@dataclass(frozen=True)
class ShardStats:
    """What a finished shard holds. Free of times, so that two runs of one recipe leave the same bytes."""

    files: dict[str, FileEntry]
    prompts: int
    candidates: int
    kept_pairs: int
    row_evals: int
    prompts_by_reason: dict[str, int]
    candidates_by_reason: dict[str, int]

    @property
    def name(self) -> str:
        """The shard's name, as its files carry it."""
        return next(iter(self.files)).partition("/")[2].removesuffix(".parquet")

    @property
    def failed(self) -> int:
        """Prompts that ended in an error, of a writer or a painter; another run may have better luck."""
        return self.prompts_by_reason.get("error", 0)


def plan_shards(rows: Sequence[CaptionRow], recipe: Recipe) -> list[Shard]:
    """Cut ``rows`` into shards of ``recipe.output.prompts_per_shard`` input rows, in order.

    Cut by each row's place in the input, usable or not: mending a bad row then changes its own shard alone.
    """
    size = recipe.output.prompts_per_shard
    parts = [(number, list(part)) for number, part in itertools.groupby(rows, lambda row: row.index // size)]
    return [
        Shard(shard_name(number, (row.prompt_id for row in part)).removesuffix(".parquet"), part)
        for number, part in parts
    ]


def finished_shards(folder: Folder) -> set[str]:
    """Names of the shards that are whole in ``folder``: all three files are there."""
    marked = {name.removeprefix("stats/").removesuffix(".json") for name in folder.list("stats/")}
    for kind in ("ledger", "pairs"):
        marked &= {name.removeprefix(f"{kind}/").removesuffix(".parquet") for name in folder.list(f"{kind}/")}
    return marked


def unfinished(
    plan: Sequence[Shard],
    folder: Folder,
    redo_changed: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> list[Shard]:
    """What is left of ``plan``. Raises InputError where the folder holds a run of other captions.

    A few shards may have changed since (a bad row was mended, the last shard grew): ``say`` is told, theirs are removed
    and come anew. With ``redo_changed`` they may be many, as long as one is left to go on from.
    """
    done, planned = finished_shards(folder), {shard.name for shard in plan}
    strangers = sorted(done - planned)
    if strangers:
        _check_strangers(strangers, done & planned, {_number(name) for name in planned}, redo_changed, folder.uri)
        say(f"{len(strangers)} finished shards hold other captions than now, the first is {strangers[0]}; made anew")
        folder.delete(MANIFEST)  # it lists them
    for name in strangers:
        for file in (f"stats/{name}.json", f"ledger/{name}.parquet", f"pairs/{name}.parquet"):
            folder.delete(file)
    return [shard for shard in plan if shard.name not in done]


def _check_strangers(
    strangers: Sequence[str], same: set[str], numbers: set[str], redo_changed: bool, place: str
) -> None:
    """Raise InputError where ``strangers`` are more than a few beside the shards that stayed the ``same``."""
    few = max(CHANGED_AT_LEAST, int(CHANGED_SHARE * (len(strangers) + len(same))))
    fewer_captions = any(_number(name) not in numbers for name in strangers)
    if len(strangers) <= min(few, len(same)) and not fewer_captions:
        return
    if redo_changed and same:
        return
    remedy = ", or pass --redo-changed to delete them and make anew what changed" if same else ""
    raise InputError(
        f"{place}: holds {len(strangers)} shards of other captions (the first is {strangers[0]}); "
        f"choose another --output, or give the captions that the run was started with{remedy}"
    )


def _number(shard: str) -> str:
    """``part-00007-1a2b3c4d`` is number ``00007``."""
    return shard.split("-")[1]


def commit_shard(folder: Folder, name: str, batch: Batch, recipe: Recipe, run_id: str) -> ShardStats:
    """Write one worked-on shard. Run again with the same batch it leaves the same bytes.

    A shard that is there already stops being finished first: cut in between, old stats would vouch for new tables.

    ``batch``: the painter's columns, and one string each for ``WEIGHTS``, the ids of the weights that painted.
    """
    columns = {name: values for name, values in batch.items() if name not in WEIGHTS}
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(batch["prompt_id"]))]
    ledger = [ledger_record(_ledger_row(row)) for row in rows]
    how = {
        "sampler": recipe.pairs.sampler, "steps": recipe.pairs.steps, "p2p_mode": recipe.pairs.p2p_mode,
        "run_id": run_id, "recipe_sha256": sha256(recipe.to_json().encode()),
        **{name: str(batch[name]) for name in WEIGHTS},
    }  # fmt: skip
    pairs = [_pair_record(row, pair, how) for row in rows for pair in row["pairs"]]
    folder.delete(f"stats/{name}.json")
    files = write_shard(folder, f"{name}.parquet", ledger, pairs)
    stats = _stats(files, ledger)
    folder.write(f"stats/{name}.json", (json.dumps(stats.__dict__, indent=1, sort_keys=True) + "\n").encode())
    return stats


def read_stats(folder: Folder, names: Iterable[str]) -> Iterator[ShardStats]:
    """The stats of finished shards, read many at a time: on S3 each is a round trip."""

    def one(name: str) -> ShardStats:
        return ShardStats(**json.loads(folder.read(f"stats/{name}.json")))

    with ThreadPoolExecutor(16) as readers:
        yield from readers.map(one, names)


def run_id_of(recipe: Recipe) -> str:
    """A name for everything that one recipe makes."""
    return stable_id("run", recipe.to_json())


def _ledger_row(row: dict[str, typing.Any]) -> LedgerRow:
    texts = ("caption", "instruction", "edited_caption", "task", "url")
    return LedgerRow(
        **{name: str(row[name]) for name in ("prompt_id", "status", "reason", "error")},
        index=int(row["index"]),
        triplet=Triplet(**{name: str(row[name]) for name in texts}),
        candidates=tuple(Candidate(**candidate) for candidate in row["candidates"]),
        row_evals=int(row["row_evals"]),
    )


def _pair_record(
    row: dict[str, typing.Any], pair: dict[str, typing.Any], how: dict[str, typing.Any]
) -> dict[str, typing.Any]:
    height, width = decode_image(pair["original_image"]).shape[:2]
    texts = {name: str(row[name]) for name in ("prompt_id", "caption", "instruction", "edited_caption", "task", "url")}
    images = {name: image_cell(pair[name]) for name in ("original_image", "edited_image")}
    return {**texts, "index": int(row["index"]), **pair, **images, "width": width, "height": height, **how}


def _stats(files: dict[str, FileEntry], ledger: Sequence[dict[str, typing.Any]]) -> ShardStats:
    prompts = collections.Counter(row["reason"] if row["status"] == "refused" else row["status"] for row in ledger)
    candidates = collections.Counter(c["reason"] for row in ledger for c in row["candidates"])
    return ShardStats(
        files=files, prompts=len(ledger), candidates=sum(row["n_candidates"] for row in ledger),
        kept_pairs=sum(row["n_kept"] for row in ledger), row_evals=sum(row["row_evals"] for row in ledger),
        prompts_by_reason=dict(prompts), candidates_by_reason=dict(candidates),
    )  # fmt: skip
