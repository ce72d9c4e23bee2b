"""What training reads of a pair, and the source that makes it from pictures.

A source of pairs has ``len()``, ``latent_shape``, ``null_state`` and ``rows(indices, flips) -> PairColumns``. There are
two: ``PictureRows`` here encodes at each use; ``CachedRows`` (latent_cache.py) reads what was encoded once. For the
same indices and flips they give the same columns up to fp16.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ip2p.errors import DatasetError
from ip2p.training.encoding import PairEncoder, square_pair
from ip2p.training.pair_index import Pages, Record, ShardRows, rows_table
from ip2p.training.sides import names_a_side

PICTURE_BUDGET_BYTES = 2**30
TEXT_COLUMNS = ("instruction", "caption", "edited_caption")


@dataclass(frozen=True)
class PairColumns:
    """``n`` pairs as a step needs them, on one device."""

    edited_mean: torch.Tensor  # (n, C, h, w) of the VAE's posterior of the edited image, not scaled
    edited_std: torch.Tensor  # (n, C, h, w)
    original_mode: torch.Tensor  # (n, C, h, w) of the original image, not scaled
    text_states: torch.Tensor  # (n, T, D) of the instruction


class PairSource(typing.Protocol):
    """Where pairs come from. Read by one thread at a time.

    ``flips`` ``(n,)`` bool asks for mirrored pairs; pairs whose texts name a side stay as they are.
    """

    latent_shape: tuple[int, int, int]
    null_state: torch.Tensor  # (T, D), the states of ""

    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray, flips: np.ndarray) -> PairColumns: ...


class PictureRows:
    """Pairs from their pictures: decoded, cropped, mirrored and encoded at each use.

    ``shards`` comes from ``pair_index.list_pairs``. Raises DatasetError for a shard or a picture that cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[ShardRows],
        encoder: PairEncoder,
        resolution: int,
        budget_bytes: int = PICTURE_BUDGET_BYTES,
        threads: int = 1,
    ):
        def read(page: int) -> tuple[list[Record], int]:
            table = rows_table(shards[page])
            return table.to_pylist(), table.nbytes

        self.encoder, self.resolution = encoder, resolution
        self.latent_shape = encoder.latent_shape(resolution)
        self.null_state = encoder.texts([""])[0]
        self._pages = Pages([len(shard.rows) for shard in shards], read, budget_bytes)
        self._threads = ThreadPoolExecutor(threads)  # Pillow lets go of the interpreter while it works

    def __len__(self) -> int:
        return len(self._pages)

    def rows(self, indices: np.ndarray, flips: np.ndarray) -> PairColumns:
        records: list[Record] = [{}] * len(indices)
        for page, wanted, rows in self._pages.find(indices):
            for place, row in zip(wanted, rows, strict=True):
                records[place] = page[row]
        pictures = encode_pictures(records, flips, self.encoder, self.resolution, self._threads)
        return PairColumns(*pictures, self.encoder.texts([record["instruction"] for record in records]))


def encode_pictures(
    records: Sequence[Record],
    flips: np.ndarray,
    encoder: PairEncoder,
    resolution: int,
    threads: ThreadPoolExecutor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``edited_mean``, ``edited_std`` and ``original_mode`` of ``records`` (``pair_index.TRAINING_COLUMNS``).

    Both pictures of a pair are mirrored where ``flips`` ``(n,)`` bool says so and its texts allow it.
    """
    mirrored = flips & np.array([may_mirror(record) for record in records])
    apply = threads.map if threads else map
    squares = list(apply(lambda record: decoded_pair(record, resolution), records))
    pixels = np.stack([square for pair in zip(*squares, strict=True) for square in pair])  # originals, then edited ones
    both = np.concatenate([mirrored, mirrored])
    pixels[both] = pixels[both, :, ::-1]
    mean, std = encoder.posterior(pixels)
    count = len(records)
    return mean[count:], std[count:], mean[:count]


def may_mirror(record: Record) -> bool:
    """Whether the texts of a pair stay true when its pictures are mirrored."""
    return not names_a_side(*(record[name] for name in TEXT_COLUMNS))


def decoded_pair(record: Record, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Original and edited image, ``(resolution, resolution, 3)`` uint8. DatasetError names a pair without them."""
    pictures = record["original_image"]["bytes"], record["edited_image"]["bytes"]
    try:
        return square_pair(*pictures, record["pair_id"], resolution)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"pair {record['pair_id']}: a picture cannot be decoded ({error}); "
            "run `ip2p verify` on its folder, or make it again"
        ) from error
