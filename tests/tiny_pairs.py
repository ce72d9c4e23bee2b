"""A finished run of kept pairs of 16-pixel pictures, for what trains on them: real files, no painting."""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np

from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import shard_name, write_shard
from ip2p.dataset.tables import PROVENANCE, SIMILARITIES, image_cell
from ip2p.images import encode_image
from ip2p.storage import Folder, LocalFolder
from ip2p.training import latent_cache
from ip2p.training.encoding import PairEncoder
from ip2p.training.pair_index import ShardRows

Record = dict[str, typing.Any]
INSTRUCTIONS = ("make it night", "turn it into a drawing", "move it to the left")
SPLIT_OF_PLACE = ("train", "train", "val", "train")


def smooth_pixels(seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """``(H, W, 3)`` uint8, different at every border, so that a flip or a crop shows."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    slopes = random.integers(2, 9, (2, 3))
    return np.clip(rows[..., None] * slopes[0] + columns[..., None] * slopes[1] + seed % 40, 0, 255).astype(np.uint8)


def make_pair(place: int, size: tuple[int, int] = (16, 16), splits: tuple[str, ...] = SPLIT_OF_PLACE) -> Record:
    original, edited = (image_cell(encode_image(smooth_pixels(2 * place + k, size))) for k in range(2))
    return {
        "pair_id": f"pair{place:04d}", "prompt_id": f"prompt{place:04d}", "index": place, "rank": 0, "seed": place,
        "original_image": original, "edited_image": edited, "caption": "a red boat on water",
        "instruction": INSTRUCTIONS[place % 3], "edited_caption": "a red boat at night", "task": "sky", "url": "",
        "p2p_threshold": 0.5, "guidance_scale": 4.0, "sampler": "euler_ancestral", "steps": 20, "p2p_mode": "cross",
        **dict.fromkeys(SIMILARITIES, 0.5), "width": size[1], "height": size[0],
        "split": splits[place % len(splits)], **dict.fromkeys(PROVENANCE, "abc"),
    }  # fmt: skip


def write_run(
    root: Path,
    places: typing.Iterable[int],
    per_shard: int = 4,
    size: tuple[int, int] = (16, 16),
    splits: tuple[str, ...] = SPLIT_OF_PLACE,
) -> str:
    """A finished run of pairs (its ledger is empty: training never reads it); returns its uri."""
    pairs = [make_pair(place, size, splits) for place in places]
    folder, files = LocalFolder(root), {}
    for first in range(0, len(pairs), per_shard):
        shard = pairs[first : first + per_shard]
        files |= write_shard(folder, shard_name(first // per_shard, [row["prompt_id"] for row in shard]), [], shard)
    write_manifest(folder, files)
    return str(root)


def make_cache(
    folder: Folder,
    identity: latent_cache.CacheIdentity,
    splits: dict[str, list[ShardRows]],
    encoder: PairEncoder,
    pairs_per_part: int = latent_cache.PAIRS_PER_PART,
) -> None:
    """The latent cache of ``splits`` as ``jobs/train.py`` makes it, in this process."""
    if latent_cache.is_finished(folder, identity):
        return
    files = {}
    for part in latent_cache.planned_parts(splits, pairs_per_part).values():
        files |= latent_cache.make_part(folder, identity, **part, encoder=encoder)
    latent_cache.finish_cache(folder, identity, files, encoder)
