"""A run as the directory tree of the released instruct-pix2pix code, which its ``EditDataset`` reads unchanged.

``0000000/prompt.json``, ``{seed}_0.jpg``, ``{seed}_1.jpg``, ``metadata.jsonl`` for each prompt with kept pairs, and
``seeds.json`` over all. Differences from the original's own writer: JPEG keeps full colour (4:4:4; the original's
quality 100 is 4:2:0), prompts without a pair have no directory, and running twice repeats nothing.
"""

from __future__ import annotations

import collections
import io
import json
import math
import typing

import numpy as np
from PIL import Image

from ip2p.dataset.claim import claim
from ip2p.dataset.manifest import MANIFEST
from ip2p.dataset.names import ORIGINAL_IMAGES, ORIGINAL_NUMBERS, ORIGINAL_TEXTS
from ip2p.dataset.run_folder import Record, by_prompt, iterate_pair_shards, iterate_pairs
from ip2p.dataset.tables import SPLITS
from ip2p.errors import DatasetError
from ip2p.images import decode_image
from ip2p.storage import Folder, sha256


class _Place(typing.NamedTuple):
    split: int  # position in SPLITS
    prompt: int  # the run's ``index`` of it
    prompt_id: str


def export_original(
    run: Folder, output: Folder, progress: typing.Callable[[int], object] = lambda pairs: None
) -> dict[str, int]:
    """Write the finished run ``run`` to ``output`` and return counts; ``progress`` is told of each prompt's pairs.

    ``EditDataset`` splits by position (90 / 5 / 5 %). Directories are numbered train first, then val, then test, so
    its cut falls near ours; ``in_another_split`` counts the prompts beyond it. ``seeds.json`` is written last.
    Raises DatasetError for an unfinished, damaged or empty run, InputError if ``output`` holds something else.
    """
    places, seeds = _places_and_seeds(run)
    if not places:
        raise DatasetError(f"{run.uri}: no pair was kept, so there is nothing to export; see its summary.json")
    claim(output, "export.json", {"format": "original", "run_manifest_sha256": sha256(run.read(MANIFEST))})
    names = {place.prompt_id: f"{number:07d}" for number, place in enumerate(places)}
    for shard in iterate_pair_shards(run):
        for prompt_id, pairs in by_prompt(shard).items():
            _write_prompt(output, names[prompt_id], pairs)
            progress(len(pairs))
    index = [[names[place.prompt_id], seeds[place.prompt_id]] for place in places]
    output.write("seeds.json", json.dumps(index).encode())
    return _counts(places, seeds)


def _places_and_seeds(run: Folder) -> tuple[list[_Place], dict[str, list[str]]]:
    places: set[_Place] = set()
    seeds: dict[str, list[str]] = collections.defaultdict(list)
    for pair in iterate_pairs(run, ["prompt_id", "index", "split", "seed"]):
        places.add(_Place(SPLITS.index(pair["split"]), pair["index"], pair["prompt_id"]))
        seeds[pair["prompt_id"]].append(str(pair["seed"]))
    for prompt_id, used in seeds.items():
        used.sort()  # as the original lists them: by file name
        if len(set(used)) < len(used):
            raise DatasetError(f"prompt {prompt_id}: two pairs have one seed, and the tree names pictures by seed")
    return sorted(places), seeds


def _write_prompt(output: Folder, name: str, pairs: list[Record]) -> None:
    """One directory; ``prompt.json`` last, since readers cannot use a directory without it."""
    for pair in pairs:
        for column, number in ORIGINAL_IMAGES.items():
            output.write(f"{name}/{pair['seed']}_{number}.jpg", _jpeg(pair[column]["bytes"]))
    lines = [json.dumps({"seed": pair["seed"], **_numbers(pair)}) + "\n" for pair in pairs]
    output.write(f"{name}/metadata.jsonl", "".join(lines).encode())
    texts = {theirs: pairs[0][ours] for ours, keys in ORIGINAL_TEXTS.items() for theirs in keys}
    output.write(f"{name}/prompt.json", json.dumps(texts).encode())


def _numbers(pair: Record) -> dict[str, float | None]:
    # NaN is not JSON; the shortest decimal of a float32 reads back as the same float32.
    return {
        theirs: None if math.isnan(pair[ours]) else float(str(np.float32(pair[ours])))
        for ours, theirs in ORIGINAL_NUMBERS.items()
    }


def _jpeg(data: bytes) -> bytes:
    if data.startswith(b"\xff\xd8\xff"):
        return data  # already JPEG: encoding it again would only lose
    buffer = io.BytesIO()
    Image.fromarray(decode_image(data)).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def _counts(places: list[_Place], seeds: dict[str, list[str]]) -> dict[str, int]:
    # The original's own cut: floor(fraction * length), with its fractions added as floats.
    cuts = [math.floor(share * len(places)) for share in (0.9, 0.9 + 0.05)]
    moved = sum(sum(number >= cut for cut in cuts) != place.split for number, place in enumerate(places))
    pairs = {name: sum(len(seeds[p.prompt_id]) for p in places if SPLITS[p.split] == name) for name in SPLITS}
    return {"prompts": len(places), "pairs": sum(pairs.values()), **pairs, "in_another_split": moved}
