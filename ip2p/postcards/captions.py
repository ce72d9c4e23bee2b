"""Captions for a datagen run without a caption file: the postcard grammar's own, numbered and repeatable."""

from __future__ import annotations

import numpy as np

from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import caption_of, sample_wording
from ip2p.seeds import stable_id
from ip2p.triplets.acceptance import normalised
from ip2p.triplets.captions import CaptionFile, CaptionRow

CAPTION_SET = 31  # apart from every set of drawings that the family was trained on


def postcard_captions(count: int, seed: int = 0, held_out: bool | None = None) -> CaptionFile:
    """The first ``count`` different captions of set ``seed``; ``held_out`` as in ``scene.sample_scene``."""
    rows: list[CaptionRow] = []
    seen: set[str] = set()
    place = 0
    while len(rows) < count:
        rng = np.random.default_rng((CAPTION_SET, seed, place))
        text = caption_of(scene_of(CAPTION_SET + seed, place, held_out), sample_wording(rng))
        if text not in seen:
            rows.append(CaptionRow(len(rows), stable_id(normalised(text)), len(rows) + 1, text))
        seen.add(text)
        place += 1
    return CaptionFile(f"postcard grammar, seed {seed}", rows, [])
