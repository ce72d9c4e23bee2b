"""The folder of a run of written triplets: parts, what is left to do, and the end that makes one file of them.

``parts/part-*.parquet`` hold a row for each triplet asked for, accepted or not; each appears whole, when its shard is
done. ``finish`` reads them all in the captions' order, refuses near duplicates of the whole run and types that came
too often, and writes ``triplets.jsonl`` (what --triplets of jobs/datagen.py reads), ``refused.jsonl`` and a summary.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
PARTS = "parts/"
TRIPLETS, REFUSED, SUMMARY = "triplets.jsonl", "refused.jsonl", "summary.json"
_OUT = ("caption", "instruction", "edited_caption", "task", "url", "verdict")


def write_part(folder: Folder, name: str, rows: Sequence[Row]) -> None:
    """One shard's rows, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), buffer, compression="zstd")
    folder.write(_file(name), buffer.getvalue())


def finished_part(folder: Folder, name: str, captions: Sequence[CaptionRow]) -> list[Row]:
    """The rows of a part that is there already, if it holds exactly ``captions`` and no error; else none."""
    rows = _read(folder, _file(name)) if folder.exists(_file(name)) else []
    return rows if without_errors(rows) == {caption.prompt_id for caption in captions} else []


def read_rows(folder: Folder) -> list[Row]:
    """The rows of all parts by index and copy. Of one that was tried again after an error the better one stays."""
    rows: dict[tuple[str, int], Row] = {}
    for name in sorted(folder.list(PARTS)):
        for row in _read(folder, name):
            key = (row["prompt_id"], row["copy"])
            if key not in rows or rows[key]["status"] == "error":
                rows[key] = row
    return sorted(rows.values(), key=lambda row: (row["index"], row["copy"]))


def cost_so_far(folder: Folder) -> float:
    """What a run has cost up to here, each answer once.

    Of captions that nobody will work on again the rows say it, of all others the answers: copies that were accepted
    beside one that ended in an error are kept there, to be used when the caption is tried again.
    """
    rows = read_rows(folder)
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
    rows = read_rows(folder)
    _refuse_near_duplicates(rows, writing.near_duplicate)
    _refuse_over_quota(rows, writing)
    accepted = [row for row in rows if row["status"] == "accepted"]
    folder.write(TRIPLETS, _lines({name: row[name] for name in _OUT} for row in accepted))
    folder.write(REFUSED, _lines(_refusal(row) for row in rows if row["status"] != "accepted"))
    summary = summary_of(rows, seconds)
    folder.write(SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def summary_of(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """Counts of a run. ``by_reason`` is where each row ended, ``refused_tries`` every completion that was refused."""
    accepted = [row for row in rows if row["status"] == "accepted"]
    tries: Counter[str] = Counter()
    for row in rows:
        tries.update(json.loads(row["refusals"]))
    return {
        "captions": len({row["prompt_id"] for row in rows}),
        "asked_for": len(rows),
        "triplets": len(accepted),
        "by_reason": dict(sorted(Counter(row["reason"] for row in rows).items())),
        "refused_tries": dict(sorted(tries.items())),
        "by_task": dict(sorted(Counter(row["task"] for row in accepted).items())),
        "verdicts": dict(sorted(Counter(row["verdict"] for row in accepted if row["verdict"]).items())),
        "completions": sum(row["tries"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "cost": round(sum(row["cost"] for row in rows), 6),
        "seconds": round(seconds, 1),
    }


def _file(part: str) -> str:
    return f"{PARTS}{part}.parquet"


def _read(folder: Folder, file: str) -> list[Row]:
    rows: list[Row] = pq.read_table(io.BytesIO(folder.read(file))).to_pylist()
    return rows


def _refuse_near_duplicates(rows: Sequence[Row], threshold: float) -> None:
    if not threshold:
        return
    duplicates = MinHashDuplicates(threshold)
    for row in rows:
        if row["status"] == "accepted" and not duplicates.add(row["caption"], row["instruction"]):
            row["status"], row["reason"] = "refused", "near_duplicate"


def _refuse_over_quota(rows: Sequence[Row], writing: Writing) -> None:
    shares = parse_shares(writing.shares, edit_types(writing.types).names)
    if not shares:
        return
    accepted = [row for row in rows if row["status"] == "accepted"]
    stays = within_shares([row["task"] for row in accepted], shares, writing.share_tolerance)
    for row, stay in zip(accepted, stays, strict=True):
        if not stay:
            row["status"], row["reason"] = "refused", "over_quota"


def _refusal(row: Row) -> Row:
    names = ("caption", "instruction", "edited_caption", "task", "asked", "status", "reason", "error", "tries")
    return {name: row[name] for name in names if row[name] != ""}


def _lines(records: Iterable[Row]) -> bytes:
    def lines() -> Iterator[str]:
        for record in records:
            yield json.dumps(record, ensure_ascii=False) + "\n"

    return "".join(lines()).encode()
