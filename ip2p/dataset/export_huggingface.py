"""A run as a Hugging Face dataset: Parquet files of five columns and a dataset card.

The columns are those of ``timbrooks/instructpix2pix-clip-filtered``, so ``datasets.load_dataset(folder)`` opens it and
diffusers' train_instruct_pix2pix.py trains on it (``--original_image_column original_image``). Scores and provenance
stay in the run. Nothing is uploaded.
"""

from __future__ import annotations

import collections
import typing

import pyarrow as pa

from ip2p.dataset.claim import claim
from ip2p.dataset.manifest import MANIFEST
from ip2p.dataset.names import HUGGINGFACE_COLUMNS, HUGGINGFACE_SPLITS
from ip2p.dataset.run_folder import Record, by_prompt, iterate_pair_shards
from ip2p.dataset.tables import PAIRS_SCHEMA, parquet_bytes, with_image_features
from ip2p.errors import DatasetError, InputError
from ip2p.storage import Folder, sha256

PAIRS_PER_PROMPT = ("all", "one")
SCHEMA = with_image_features(
    pa.schema([(theirs, PAIRS_SCHEMA.field(ours).type) for ours, theirs in HUGGINGFACE_COLUMNS.items()])
)


def export_huggingface(
    run: Folder,
    output: Folder,
    pairs_per_prompt: str = "all",
    progress: typing.Callable[[int], object] = lambda pairs: None,
    pairs_per_file: int = 512,
) -> dict[str, int]:
    """Write the finished run ``run`` to ``output`` as ``data/{split}-00000-of-00001.parquet`` … and ``README.md``.

    ``pairs_per_prompt``: ``all``, or ``one`` (the best of each prompt, as in the original's own Hugging Face dataset).
    Returns counts. Memory holds up to ``pairs_per_file`` pairs a split. Raises DatasetError for an unfinished, damaged
    or empty run, InputError if ``output`` holds something else.
    """
    if pairs_per_prompt not in PAIRS_PER_PROMPT:
        raise InputError(f"--pairs-per-prompt is {' or '.join(PAIRS_PER_PROMPT)}, got {pairs_per_prompt!r}")
    totals, prompts = _totals(run, pairs_per_prompt)
    if not prompts:
        raise DatasetError(f"{run.uri}: no pair was kept, so there is nothing to export; see its summary.json")
    identity = {"format": "hf", "pairs_per_prompt": pairs_per_prompt, "pairs_per_file": pairs_per_file}
    claim(output, "export.json", {**identity, "run_manifest_sha256": sha256(run.read(MANIFEST))})
    waiting: dict[str, list[Record]] = {split: [] for split in totals}
    written: collections.Counter[str] = collections.Counter()
    for pair in _chosen(run, pairs_per_prompt):
        split, rows = pair["split"], waiting[pair["split"]]
        rows.append({theirs: pair[ours] for ours, theirs in HUGGINGFACE_COLUMNS.items()})
        if len(rows) == pairs_per_file or written[split] + len(rows) == totals[split]:
            name = _file_name(split, written[split] // pairs_per_file, -(-totals[split] // pairs_per_file))
            output.write(name, parquet_bytes(pa.Table.from_pylist(rows, SCHEMA)))
            written[split] += len(rows)
            rows.clear()
        progress(1)
    output.write("README.md", _card(totals, prompts, pairs_per_prompt).encode())
    return {"prompts": prompts, "pairs": totals.total(), **{split: totals[split] for split in HUGGINGFACE_SPLITS}}


def _chosen(run: Folder, pairs_per_prompt: str, columns: list[str] | None = None) -> typing.Iterator[Record]:
    for shard in iterate_pair_shards(run, columns):
        for pairs in by_prompt(shard).values():
            yield from pairs[:1] if pairs_per_prompt == "one" else pairs


def _totals(run: Folder, pairs_per_prompt: str) -> tuple[collections.Counter[str], int]:
    """Pairs a split, and prompts: a file's name says how many there will be, so they are counted first."""
    totals: collections.Counter[str] = collections.Counter()
    prompts = set()
    for pair in _chosen(run, pairs_per_prompt, ["prompt_id", "rank", "split"]):
        totals[pair["split"]] += 1
        prompts.add(pair["prompt_id"])
    return totals, len(prompts)


def _file_name(split: str, number: int, files: int) -> str:
    return f"data/{HUGGINGFACE_SPLITS[split]}-{number:05d}-of-{files:05d}.parquet"


def _card(totals: collections.Counter[str], prompts: int, pairs_per_prompt: str) -> str:
    """The dataset card. No date and no place in it, so that exporting again gives the same bytes."""
    kinds = {"struct<bytes: binary, path: string>": "image"}
    splits = [split for split in HUGGINGFACE_SPLITS if totals[split]]
    lines = ["---", "task_categories:", "- image-to-image", "tags:", "- instruct-pix2pix", "- image-editing"]
    lines += ["dataset_info:", "  features:"]
    for field in SCHEMA:
        lines += [f"  - name: {field.name}", f"    dtype: {kinds.get(str(field.type), str(field.type))}"]
    lines += ["  splits:"]
    for split in splits:
        lines += [f"  - name: {HUGGINGFACE_SPLITS[split]}", f"    num_examples: {totals[split]}"]
    lines += ["configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {HUGGINGFACE_SPLITS[split]}", f"    path: data/{HUGGINGFACE_SPLITS[split]}-*.parquet"]
    return "\n".join([*lines, "---", "", *_prose(totals.total(), prompts, pairs_per_prompt), ""])


def _prose(pairs: int, prompts: int, pairs_per_prompt: str) -> list[str]:
    return [
        "# Image editing by instruction",
        "",
        f"{pairs} pairs of {prompts} prompts ({pairs_per_prompt} per prompt), painted with Prompt-to-Prompt and",
        "filtered by CLIP, in the manner of InstructPix2Pix (Brooks et al. 2023).",
        "",
        "| column | what it holds |",
        "|---|---|",
        "| `original_prompt` | caption of the original image |",
        "| `original_image` | the image before the edit |",
        "| `edit_prompt` | the instruction |",
        "| `edited_prompt` | caption of the edited image |",
        "| `edited_image` | the image after the edit |",
        "",
        "All pairs of one caption are in one split (90 / 5 / 5 %, by a hash of the caption).",
    ]
