"""Pairs that need no painting: a drawing with a patch that is gone or foreign, and the whole drawing.

The instruction is the drawing's caption. What an editor learns from them before it sees an edit is to look: to copy
what is there, to the smallest bird, and to fill in by the text what is not, as inpainting models do. Painted pairs are
too few, and not alike enough, to teach that. The paper has no counterpart; it starts from a model of photographs and
has 450,000 pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ip2p.dataset.imported import ImportedPair, ImportedPrompt
from ip2p.images import encode_image
from ip2p.postcards.family.drawings import SIZE, scene_of
from ip2p.postcards.grammar import caption_of, sample_wording
from ip2p.postcards.renderer import render
from ip2p.schema import Triplet
from ip2p.seeds import derive_seed

DRAWINGS = 100_000
"""From how many drawings foreign patches are taken."""
WHOLE, EMPTY = 0.1, 0.4
"""Shares of drawings that are left whole, and that have grey patches; the others have foreign ones."""
VAL_EVERY = 50


def restorations(first: int, count: int, seed: int = 0) -> Iterator[ImportedPrompt]:
    """Drawings ``first`` and on of the training set ``seed``, each with one pair."""
    for index in range(first, first + count):
        rng = np.random.default_rng(derive_seed("restoration", index))
        scene = scene_of(seed, index)
        picture, caption = render(scene, SIZE), caption_of(scene, sample_wording(rng))
        pair = ImportedPair(index, encode_image(_spoiled(rng, picture, seed)), encode_image(picture), (SIZE, SIZE))
        split = "train" if index % VAL_EVERY else "val"
        yield ImportedPrompt(str(index), Triplet(caption, caption, caption), (pair,), split=split)


def _spoiled(rng: np.random.Generator, picture: np.ndarray, seed: int) -> np.ndarray:
    """``picture`` with one or two patches of a quarter to three quarters of its sides."""
    kind = rng.random()
    if kind < WHOLE:
        return picture
    spoiled = picture.copy()
    other = int(rng.integers(DRAWINGS))
    foreign = np.full_like(picture, 128) if kind < WHOLE + EMPTY else render(scene_of(seed, other), SIZE)
    for _ in range(int(rng.integers(1, 3))):
        height, width = (int(side) for side in rng.integers(SIZE // 4, 3 * SIZE // 4 + 1, size=2))
        top, left = int(rng.integers(0, SIZE + 1 - height)), int(rng.integers(0, SIZE + 1 - width))
        patch = np.s_[top : top + height, left : left + width]
        spoiled[patch] = foreign[patch]
    return spoiled
