"""Kept pairs turned around: what was added is removed. Each pair of a run gives a second one at no painting.

The paper has no counterpart; its model is weak at removing and replacing, of which a run keeps few. The pictures and
captions change places, and the words of the way back come from a file of triplets.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping

from ip2p.dataset.imported import NUMBERS, ImportedPair, ImportedPrompt, ImportReport, write_imported_run
from ip2p.dataset.run_folder import Record, by_prompt, iterate_pair_shards
from ip2p.schema import Triplet
from ip2p.storage import Folder
from ip2p.triplets.captions import CaptionRow

CHANGED_PLACES = {"sim_original": "sim_edited", "sim_edited": "sim_original"}


def invert_run(
    run: Folder,
    triplets: typing.Sequence[CaptionRow],
    output: Folder,
    progress: typing.Callable[[int], object] = lambda prompts: None,
) -> ImportReport:
    """Write the pairs of the finished ``run``, turned around, as a run to ``output``.

    A prompt whose way back (a triplet from its edited caption to its caption) is not in ``triplets`` is left out and
    named in the report. Pairs keep their split, so what is held out one way is held out the other way too. Raises
    DatasetError where nothing is left, InputError where ``output`` holds something else.
    """
    words = {(row.caption, row.edited_caption): row.instruction for row in triplets if row.instruction}
    return write_imported_run(
        _inverted(run, words), output, {"format": "inverse", "source": run.uri}, progress
    )  # fmt: skip


def _inverted(run: Folder, words: Mapping[tuple[str, str], str]) -> Iterator[ImportedPrompt]:
    for shard in iterate_pair_shards(run):
        for prompt_id, pairs in by_prompt(shard).items():
            first = pairs[0]
            ways = (first["edited_caption"], first["caption"])
            if ways not in words:
                triplet = Triplet(ways[0], "", ways[1])
                missing = f"no triplet leads from {ways[0]!r} back to {ways[1]!r}"
                yield ImportedPrompt(prompt_id, triplet, problems=(missing,), split=first["split"])
                continue
            triplet = Triplet(ways[0], words[ways], ways[1])
            yield ImportedPrompt(prompt_id, triplet, tuple(_turned(pair) for pair in pairs), split=first["split"])


def _turned(pair: Record) -> ImportedPair:
    numbers = {name: pair[CHANGED_PLACES.get(name, name)] for name in NUMBERS}
    original, edited = (pair[name]["bytes"] for name in ("edited_image", "original_image"))
    return ImportedPair(pair["seed"], original, edited, (pair["width"], pair["height"]), numbers)
