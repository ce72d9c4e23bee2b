"""Training drawings by number: drawing ``i`` of a set is the same on every machine, so a cache is only a shortcut."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ip2p.postcards.renderer import render
from ip2p.postcards.scene import Scene, sample_scene
from ip2p.seeds import derive_seed

SIZE = 64


def scene_of(seed: int, index: int, held_out: bool | None = False) -> Scene:
    """Scene ``index`` of set ``seed``; by default only (object, colour, style) combinations seen in training."""
    return sample_scene(np.random.default_rng(derive_seed("postcards", seed, index)), held_out)


@dataclass(frozen=True)
class Drawings:
    """A set of drawings: ``pixels[i]`` is ``scene(i)`` drawn, uint8 ``(n, 64, 64, 3)``, memory-mapped."""

    seed: int
    held_out: bool | None
    pixels: np.ndarray

    def scene(self, index: int) -> Scene:
        return scene_of(self.seed, index, self.held_out)


def cached_drawings(folder: Path, count: int, seed: int = 0, held_out: bool | None = False) -> Drawings:
    """Draw ``count`` scenes of set ``seed`` once into ``folder`` (12 kB each) and map them ever after."""
    path = folder / f"drawings-{seed}-{held_out}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, SIZE, SIZE, 3))
        for i in range(count):
            pixels[i] = render(scene_of(seed, i, held_out), SIZE)
        pixels.flush()
        os.replace(partial, path)  # noqa: PTH105
    return Drawings(seed, held_out, np.load(path, mmap_mode="r"))
