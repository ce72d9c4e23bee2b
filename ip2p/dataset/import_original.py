"""A directory tree of the released instruct-pix2pix code (or one laid out like it) as a run folder.

Reads ``seeds.json`` where there is one, as the original's ``EditDataset`` does, and else looks through the directories.
A directory that cannot be used becomes a ledger row that says why; pictures keep their JPEG bytes. The published zips
are to be unpacked first.
"""

from __future__ import annotations

import json
import math
import re
import typing

from ip2p.dataset.imported import (
    TRIPLET_TEXTS,
    ImportedPair,
    ImportedPrompt,
    ImportReport,
    checked_pair,
    write_imported_run,
)
from ip2p.dataset.names import ORIGINAL_IMAGES, ORIGINAL_NUMBERS, ORIGINAL_TEXTS
from ip2p.errors import DatasetError, InputError
from ip2p.schema import Triplet
from ip2p.storage import Folder

_LARGEST_SEED = 2**64 - 1


def import_original(
    tree: Folder, output: Folder, progress: typing.Callable[[int], object] = lambda prompts: None
) -> ImportReport:
    """Read ``tree`` and write a run to ``output``; ``progress`` is told how many prompts came in.

    Accepts ``caption`` or ``input`` in prompt.json, and a missing prompt.json, metadata.jsonl or picture: what is
    missing is in the report's problems. Splits are by the caption's hash, not by position. Raises InputError where the
    tree holds no prompt or its seeds.json cannot be read, or ``output`` holds something else.
    """
    listing = _listed(tree) if tree.exists("seeds.json") else _scanned(tree)
    if not listing:
        raise InputError(f"{tree.uri}: no seeds.json and no directory with prompt.json; pass the tree's top folder")
    prompts = (_prompt(tree, name, seeds) for name, seeds in listing)
    return write_imported_run(prompts, output, {"format": "original", "source": tree.uri}, progress)


def _listed(tree: Folder) -> list[tuple[str, list[str]]]:
    try:
        return [(str(name), [str(seed) for seed in seeds]) for name, seeds in json.loads(tree.read("seeds.json"))]
    except (ValueError, TypeError) as error:
        remedy = "write it again, or delete it to have the directories looked through"
        raise InputError(f"{tree.uri}/seeds.json: not a list of [directory, [seeds]] ({error}); {remedy}") from error


def _scanned(tree: Folder) -> list[tuple[str, list[str]]]:
    found: dict[str, set[str]] = {}
    for path in tree.list():
        name, _, file = path.rpartition("/")
        picture = re.fullmatch(r"(\d+)_[01]\.jpg", file)
        if name and (picture or file == "prompt.json"):
            found.setdefault(name, set()).update(picture.groups() if picture else ())
    return [(name, sorted(seeds)) for name, seeds in sorted(found.items())]


def _prompt(tree: Folder, name: str, seeds: list[str]) -> ImportedPrompt:
    try:
        triplet = _triplet(tree, name)
    except DatasetError as error:
        return ImportedPrompt(name, Triplet("", "", ""), problems=(str(error),), readable=False)
    numbers, problems = _metadata(tree, name)
    pairs = []
    for seed in dict.fromkeys(seeds):
        try:
            pairs.append(_pair(tree, name, seed, numbers.get(seed, {})))
        except DatasetError as error:
            problems.append(f"seed {seed}: {error}")
    return ImportedPrompt(name, triplet, tuple(_ranked(pairs, list(numbers))), tuple(problems))


def _triplet(tree: Folder, name: str) -> Triplet:
    if ".." in name.split("/") or name.startswith("/"):
        raise DatasetError("the directory lies outside the tree")
    try:
        texts = json.loads(_read(tree, f"{name}/prompt.json"))
    except ValueError as error:
        raise DatasetError(f"prompt.json is not JSON ({error})") from error
    if not isinstance(texts, dict):
        raise DatasetError("prompt.json is not a JSON object")
    url = str(texts.get(ORIGINAL_TEXTS["url"][0]) or "")
    return Triplet(url=url, **{ours: _text(texts, ours) for ours in TRIPLET_TEXTS})


def _text(texts: dict[str, typing.Any], ours: str) -> str:
    keys = ORIGINAL_TEXTS[ours]
    value = next((texts[key] for key in keys if key in texts), None)
    if not isinstance(value, str):
        raise DatasetError(f"prompt.json has no text under {' or '.join(keys)}")
    return value


def _metadata(tree: Folder, name: str) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Numbers by seed. The original appends when it is rerun, so a later line of the same seed replaces an earlier."""
    numbers: dict[str, dict[str, float]] = {}
    problems = []
    if tree.exists(f"{name}/metadata.jsonl"):
        for line, text in enumerate(tree.read(f"{name}/metadata.jsonl").decode(errors="replace").splitlines(), start=1):
            try:
                record = json.loads(text)
                numbers[str(record["seed"])] = {
                    ours: math.nan if record.get(theirs) is None else float(record[theirs])
                    for ours, theirs in ORIGINAL_NUMBERS.items()
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                problems.append(f"metadata.jsonl line {line} cannot be read ({error})")
    return numbers, problems


def _pair(tree: Folder, name: str, seed: str, numbers: dict[str, float]) -> ImportedPair:
    if not re.fullmatch(r"[0-9]+", seed) or int(seed) > _LARGEST_SEED:
        raise DatasetError("is not a whole number of at most 64 bits")
    original, edited = (_read(tree, f"{name}/{seed}_{number}.jpg") for number in ORIGINAL_IMAGES.values())
    return checked_pair(int(seed), original, edited, numbers)


def _ranked(pairs: list[ImportedPair], written: list[str]) -> list[ImportedPair]:
    """Best direction first, as the original ranks; equal or unknown ones in the order of metadata.jsonl."""

    def key(pair: ImportedPair) -> tuple[float, int]:
        direction = pair.numbers.get("sim_direction", math.nan)
        place = written.index(str(pair.seed)) if str(pair.seed) in written else len(written)
        return (math.inf if math.isnan(direction) else -direction, place)

    return sorted(pairs, key=key)


def _read(tree: Folder, name: str) -> bytes:
    if not tree.exists(name):
        raise DatasetError(f"{name.rpartition('/')[2]} is missing")
    return tree.read(name)
