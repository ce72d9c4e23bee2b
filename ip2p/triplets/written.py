"""The folder of a run of written triplets: parts, what is left to do, and the end that makes one file of them.

``parts/part-*.parquet`` hold a row for each triplet asked for, accepted or not; each appears whole, when its shard is
done. ``finish`` reads them in the captions' order, refuses near duplicates of the whole run and types that came too
often, and writes ``triplets.jsonl`` (what --triplets of jobs/datagen.py reads), ``refused.jsonl`` and a summary.
Millions of rows are a usual run: whole ones are held for a few parts at a time, of all of them a few columns.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.dataset.run_folder import shard_name
from ip2p.dataset.shards import Shard
from ip2p.storage import Folder
from ip2p.triplets.answers import Answers
from ip2p.triplets.captions import CaptionRow
from ip2p.triplets.edit_types import edit_types
from ip2p.triplets.near_duplicates import MinHashDuplicates
from ip2p.triplets.shares import parse_shares, within_shares
from ip2p.triplets.writing import Row, Writing

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),  # of the caption
        ("index", pa.int64()),  # of the caption in its file
        ("copy", pa.int32()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("asked", pa.string()),  # edit type asked for, or ""
        ("instruction", pa.string()),
        ("edited_caption", pa.string()),
        ("task", pa.string()),
        ("status", pa.string()),  # accepted | refused | error
        ("reason", pa.string()),  # of the last refusal
        ("error", pa.string()),
        ("tries", pa.int32()),
        ("refusals", pa.string()),  # JSON: how often it was refused for what
        ("verdict", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cost", pa.float64()),
    ]
)
KEY = ("prompt_id", "index", "copy", "status")
"""What places a row among the others, and says which of two of one request stays."""
PARTS = "parts/"
PARTS_HELD = 8  # in the captions' order the parts of one shard, tried again now and then, lie together
TRIPLETS, REFUSED, SUMMARY = "triplets.jsonl", "refused.jsonl", "summary.json"
_OUT = ("caption", "instruction", "edited_caption", "task", "url", "verdict")

Place = tuple[str, int]
"""A part's file, and which of its rows."""


def write_part(folder: Folder, name: str, rows: Sequence[Row]) -> None:
    """One shard's rows, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), buffer, compression="zstd")
    folder.write(_file(name), buffer.getvalue())


def finished_part(folder: Folder, name: str, captions: Sequence[CaptionRow]) -> list[Row]:
    """The rows of a part that is there already, if it holds exactly ``captions`` and no error; else none."""
    rows = _read(folder, _file(name), SCHEMA.names) if folder.exists(_file(name)) else []
    return rows if without_errors(rows) == {caption.prompt_id for caption in captions} else []


def read_rows(folder: Folder, columns: Iterable[str] = SCHEMA.names) -> list[Row]:
    """The rows of all parts by index and copy. Of one that was tried again after an error the better one stays.

    KEY and ``columns`` alone are read: whole rows take several times the memory.
    """
    return [row for row, _ in _with_places(folder, columns)]


def cost_so_far(folder: Folder) -> float:
    """What a run has cost up to here, each answer once.

    Of captions that nobody will work on again the rows say it, of all others the answers: copies that were accepted
    beside one that ended in an error are kept there, to be used when the caption is tried again.
    """
    rows = read_rows(folder, ["cost"])
    settled = without_errors(rows)
    kept = sum(row["cost"] for row in rows if row["prompt_id"] in settled)
    return float(kept + Answers(folder).cost(settled.__contains__))


def without_errors(rows: Iterable[Row]) -> set[str]:
    """prompt_ids of captions none of whose rows ended in an error."""
    rows = list(rows)
    return {row["prompt_id"] for row in rows} - {row["prompt_id"] for row in rows if row["status"] == "error"}


def plan(captions: Sequence[CaptionRow], writing: Writing, done: set[str]) -> list[Shard]:
    """The shards that are left: captions by their place in the file, without those whose prompt_id is in ``done``.

    Cut before the finished captions go, so that a run that was killed goes on with the shards that it had.
    """
    shards = []
    for number, part in itertools.groupby(captions, lambda row: row.index // writing.captions_per_shard):
        left = [row for row in part if row.prompt_id not in done]
        if left:
            name = shard_name(number, (row.prompt_id for row in left)).removesuffix(".parquet")
            shards.append(Shard(name, left))
    return shards


def finished_captions(rows: Iterable[Row], per_caption: int, retry_errors: bool = False) -> set[str]:
    """prompt_ids of captions that have all their rows; with ``retry_errors`` none that ended in an error."""
    counts = Counter(row["prompt_id"] for row in rows if not (retry_errors and row["status"] == "error"))
    return {prompt_id for prompt_id, count in counts.items() if count >= per_caption}


def finish(folder: Folder, writing: Writing, seconds: float) -> dict[str, Any]:
    """Write the run's triplets, refusals and summary (last); returns the summary. Run again, the same files."""
    places = [place for _, place in _with_places(folder)]

    def rows() -> Iterator[Row]:
        return _without_near_duplicates(_rows_at(folder, places), writing.near_duplicate)

    with tempfile.TemporaryFile() as triplets, tempfile.TemporaryFile() as refused:
        summary = summary_of(_told(_within_quota(rows, writing), triplets, refused), seconds)
        for name, file in ((TRIPLETS, triplets), (REFUSED, refused)):
            file.seek(0)
            folder.write_from(name, file)
    folder.write(SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def summary_of(rows: Iterable[Row], seconds: float) -> dict[str, Any]:
    """Counts of a run. ``by_reason`` is where each row ended, ``refused_tries`` every completion that was refused."""
    by_reason, by_task, tries, verdicts, used = (Counter[str]() for _ in range(5))
    captions, costs = set(), array("d")
    for row in rows:
        captions.add(row["prompt_id"])
        costs.append(row["cost"])
        by_reason[row["reason"]] += 1
        tries.update(json.loads(row["refusals"]))
        used.update({name: row[name] for name in ("tries", "prompt_tokens", "completion_tokens")})
        if row["status"] == "accepted":
            by_task[row["task"]] += 1
            verdicts.update([row["verdict"]] if row["verdict"] else [])
    return {
        "captions": len(captions),
        "asked_for": len(costs),
        "triplets": by_task.total(),
        "by_reason": dict(sorted(by_reason.items())),
        "refused_tries": dict(sorted(tries.items())),
        "by_task": dict(sorted(by_task.items())),
        "verdicts": dict(sorted(verdicts.items())),
        "completions": used["tries"],
        "prompt_tokens": used["prompt_tokens"],
        "completion_tokens": used["completion_tokens"],
        "cost": round(sum(costs), 6),
        "seconds": round(seconds, 1),
    }


def _file(part: str) -> str:
    return f"{PARTS}{part}.parquet"


def _read(folder: Folder, file: str, columns: Iterable[str]) -> list[Row]:
    # A part is small: threads would wait for each other longer than they read.
    table = pq.read_table(io.BytesIO(folder.read(file)), columns=list(columns), use_threads=False)
    rows: list[Row] = table.to_pylist()
    return rows


def _with_places(folder: Folder, columns: Iterable[str] = ()) -> list[tuple[Row, Place]]:
    """The rows that stay, by index and copy, each with its place."""
    found: dict[tuple[str, int], tuple[Row, Place]] = {}
    columns = dict.fromkeys([*KEY, *columns])
    for file in sorted(folder.list(PARTS)):
        for number, row in enumerate(_read(folder, file, columns)):
            key = (row["prompt_id"], row["copy"])
            if key not in found or found[key][0]["status"] == "error":
                found[key] = (row, (file, number))
    return sorted(found.values(), key=lambda one: (one[0]["index"], one[0]["copy"]))


def _rows_at(folder: Folder, places: Iterable[Place]) -> Iterator[Row]:
    part = functools.lru_cache(PARTS_HELD)(lambda file: _read(folder, file, SCHEMA.names))
    for file, number in places:
        yield part(file)[number]


def _without_near_duplicates(rows: Iterable[Row], threshold: float) -> Iterator[Row]:
    """``rows``, those refused that nearly repeat an earlier one of the run."""
    duplicates = MinHashDuplicates(threshold) if threshold else None
    for row in rows:
        fresh = row["status"] != "accepted" or not duplicates or duplicates.add(row["caption"], row["instruction"])
        yield row if fresh else {**row, "status": "refused", "reason": "near_duplicate"}


def _within_quota(rows: Callable[[], Iterable[Row]], writing: Writing) -> Iterator[Row]:
    """``rows()``, those refused whose type came too often; called twice, since all types must be known first."""
    shares = parse_shares(writing.shares, edit_types(writing.types).names)
    if not shares:
        yield from rows()
        return
    tasks = [row["task"] for row in rows() if row["status"] == "accepted"]
    stays = iter(within_shares(tasks, shares, writing.share_tolerance))
    for row in rows():
        fits = row["status"] != "accepted" or next(stays)
        yield row if fits else {**row, "status": "refused", "reason": "over_quota"}


def _told(rows: Iterable[Row], triplets: BinaryIO, refused: BinaryIO) -> Iterator[Row]:
    """``rows``, each written to its file on the way."""
    for row in rows:
        if row["status"] == "accepted":
            triplets.write(_line({name: row[name] for name in _OUT}))
        else:
            refused.write(_line(_refusal(row)))
        yield row


def _refusal(row: Row) -> Row:
    names = ("caption", "instruction", "edited_caption", "task", "asked", "status", "reason", "error", "tries")
    return {name: row[name] for name in names if row[name] != ""}


def _line(record: Row) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
