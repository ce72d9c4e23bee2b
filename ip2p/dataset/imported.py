"""Foreign prompts and pairs as a run folder: what all importers share once they have read their format.

What a foreign format does not know is said plainly: NaN for a similarity or a sampling number, an empty string for a
name, 0 steps. There is no recipe.json, because no recipe of ours made the pictures.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import typing
from dataclasses import dataclass, field

from ip2p.dataset.claim import claim
from ip2p.dataset.manifest import MANIFEST, FileEntry, write_manifest
from ip2p.dataset.run_folder import Record, pair_size, shard_name, write_shard
from ip2p.dataset.tables import PROVENANCE, SIMILARITIES, image_cell, ledger_record, split_of
from ip2p.errors import DatasetError
from ip2p.schema import Candidate, LedgerRow, Triplet
from ip2p.seeds import stable_id
from ip2p.storage import Folder

SAMPLED = ("p2p_threshold", "guidance_scale")
NUMBERS = (*SAMPLED, *SIMILARITIES)
"""What may be known of how a pair was made, and of how alike its pictures and texts are."""
TRIPLET_TEXTS = ("caption", "instruction", "edited_caption")
PROMPTS_PER_SHARD = 64  # with at most four pairs a prompt, about 60 MB of 512-pixel JPEG in memory


@dataclass(frozen=True)
class ImportedPair:
    """Two pictures as they were encoded, their size in pixels, and what is known of how they were made."""

    seed: int
    original: bytes
    edited: bytes
    size: tuple[int, int]  # width, height
    numbers: dict[str, float] = field(default_factory=dict)  # of NUMBERS; unknown: absent


@dataclass(frozen=True)
class ImportedPrompt:
    """One prompt with its usable pairs, best first. ``problems`` are sentences on what could not be used."""

    place: str  # where it was read, for messages and identity
    triplet: Triplet
    pairs: tuple[ImportedPair, ...] = ()
    problems: tuple[str, ...] = ()
    readable: bool = True  # False: its texts are missing
    split: str = ""  # empty: by the caption's hash


@dataclass(frozen=True)
class ImportReport:
    """What came in. ``problems`` names each thing that was left out, and where."""

    prompts: int
    pairs: int
    problems: tuple[str, ...]


def checked_pair(seed: int, original: bytes, edited: bytes, numbers: dict[str, float] | None = None) -> ImportedPair:
    """An ImportedPair of two pictures that decode and agree in size; raises DatasetError where they do not."""
    return ImportedPair(seed, original, edited, pair_size(original, edited), numbers or {})


def write_imported_run(
    prompts: typing.Iterable[ImportedPrompt],
    output: Folder,
    source: dict[str, str],
    progress: typing.Callable[[int], object] = lambda prompts: None,
) -> ImportReport:
    """Write ``prompts`` as a run to ``output``. ``source`` (format, place) is noted in import.json and summary.json.

    The same prompts give the same bytes; importing again after a stop, or after the source changed, leaves only the new
    run. Raises InputError if ``output`` holds something else, DatasetError if not one pair could be used.
    """
    claim(output, "import.json", source)
    files: dict[str, FileEntry] = {}
    statuses: collections.Counter[str] = collections.Counter()
    pairs, problems = 0, []
    numbered = enumerate(prompts)
    while batch := list(itertools.islice(numbered, PROMPTS_PER_SHARD)):
        if not files:
            output.delete(MANIFEST)  # of an earlier import, whose shards are now written over
        ledger = [ledger_record(_ledger_row(index, prompt)) for index, prompt in batch]
        rows = [row for index, prompt in batch for row in _pair_rows(index, prompt)]
        files |= write_shard(output, shard_name(len(files) // 2, [row["prompt_id"] for row in ledger]), ledger, rows)
        statuses.update(row["status"] for row in ledger)
        problems += [f"{prompt.place}: {problem}" for _, prompt in batch for problem in prompt.problems]
        pairs += len(rows)
        progress(len(batch))
    if not pairs:
        raise DatasetError(f"{source['source']}: no usable pair; {problems[0] if problems else 'it holds no pictures'}")
    _finish(output, files, {**source, "prompts": dict(sorted(statuses.items())), "pairs": pairs})
    return ImportReport(statuses.total(), pairs, tuple(problems))


def _finish(output: Folder, files: dict[str, FileEntry], summary: dict[str, typing.Any]) -> None:
    for name in output.list("ledger/") + output.list("pairs/"):
        if name not in files:
            output.delete(name)  # of an earlier import of this same source: the claim was ours
    output.write("summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_manifest(output, files)


def _prompt_id(index: int, prompt: ImportedPrompt) -> str:
    return stable_id("imported", index, *(getattr(prompt.triplet, text) for text in TRIPLET_TEXTS))


def _ledger_row(index: int, prompt: ImportedPrompt) -> LedgerRow:
    status = "accepted" if prompt.pairs else "error" if prompt.problems else "exhausted"
    return LedgerRow(
        prompt_id=_prompt_id(index, prompt),
        index=index,
        status=status,
        reason="ok" if prompt.readable else "bad_caption",
        triplet=prompt.triplet,
        candidates=tuple(Candidate(seed=pair.seed, reason="kept", **_numbers(pair)) for pair in prompt.pairs),
        error="; ".join(prompt.problems),
    )


def _pair_rows(index: int, prompt: ImportedPrompt) -> list[Record]:
    prompt_id, split = _prompt_id(index, prompt), prompt.split or split_of(prompt.triplet.caption)
    unknown = {"sampler": "", "steps": 0, "p2p_mode": "", **dict.fromkeys(PROVENANCE, "")}
    return [
        {
            "pair_id": stable_id(prompt_id, pair.seed),
            "prompt_id": prompt_id,
            "index": index,
            "rank": rank,
            "seed": pair.seed,
            "original_image": image_cell(pair.original),
            "edited_image": image_cell(pair.edited),
            "width": pair.size[0],
            "height": pair.size[1],
            "split": split,
            **dataclasses.asdict(prompt.triplet),
            **unknown,
            **_numbers(pair),
        }
        for rank, pair in enumerate(prompt.pairs)
    ]


def _numbers(pair: ImportedPair) -> dict[str, float]:
    return {name: pair.numbers.get(name, math.nan) for name in NUMBERS}
