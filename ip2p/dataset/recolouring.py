"""Pairs in other colours: both pictures with their colour channels changed about, the instruction as it was.

Where an edit speaks of shapes ("replace the house with a boat"), it is as right in colours that no such picture has.
Such pairs are meant to teach an editor to take the colours of the edited image from the original, and not from what it
has seen of such things. The paper has no counterpart. Which instructions stay true is for the caller to say: "make it
night", or "add a rainbow", do not.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np

from ip2p.dataset.imported import SAMPLED, ImportedPair, ImportedPrompt, ImportReport, write_imported_run
from ip2p.dataset.run_folder import Record, by_prompt, iterate_pair_shards
from ip2p.images import decode_image, encode_image
from ip2p.schema import Triplet
from ip2p.seeds import derive_seed
from ip2p.storage import Folder

ORDERS = tuple(itertools.permutations(range(3)))[1:]
"""Every order of red, green and blue but their own."""


def recolour_run(
    run: Folder,
    output: Folder,
    instructions: re.Pattern[str],
    times: int = 1,
    progress: Callable[[int], object] = lambda prompts: None,
) -> ImportReport:
    """Write the pairs of the finished ``run`` whose instruction has ``instructions`` in it, recoloured, to ``output``.

    Each comes ``times`` times, 1 to 5, in that many orders of the channels, drawn by its pair_id. Only pairs of the
    split ``train``: what is held out stays as it looks in the world. Pictures are PNG. The captions are left empty,
    as they may name colours that are gone, and so are the similarities, which were of other pictures.

    Raises DatasetError where nothing is left, InputError where ``output`` holds something else.
    """
    source = {"format": "recolouring", "source": run.uri, "only": instructions.pattern, "times": str(times)}
    return write_imported_run(_recoloured(run, instructions, times), output, source, progress)


def _recoloured(run: Folder, instructions: re.Pattern[str], times: int) -> Iterator[ImportedPrompt]:
    for shard in iterate_pair_shards(run):
        for prompt_id, pairs in by_prompt(shard).items():
            instruction, split = pairs[0]["instruction"], pairs[0]["split"]
            if split != "train" or not instructions.search(instruction):
                continue
            triplet = Triplet("", instruction, "")
            orders = [_orders(pair, times) for pair in pairs]
            for turn in range(times):
                recoloured = tuple(_in_order(pair, order[turn]) for pair, order in zip(pairs, orders, strict=True))
                yield ImportedPrompt(prompt_id, triplet, recoloured, split=split)


def _orders(pair: Record, times: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(derive_seed("recolouring", pair["pair_id"]))
    return [ORDERS[place] for place in rng.permutation(len(ORDERS))[:times]]


def _in_order(pair: Record, order: tuple[int, ...]) -> ImportedPair:
    original, edited = (
        encode_image(decode_image(pair[name]["bytes"])[:, :, list(order)])
        for name in ("original_image", "edited_image")
    )
    how = {name: pair[name] for name in SAMPLED}
    return ImportedPair(pair["seed"], original, edited, (pair["width"], pair["height"]), how)
