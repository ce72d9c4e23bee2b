#!/usr/bin/env python3
"""What the embedded text-to-image model paints, read by the attribute reader: accuracy by attribute, and a sheet.

    python bench/postcard_pictures.py --count 300 --output docs/figures

Captions are of (object, colour, style) combinations that were never in training data. No filter is applied.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from ip2p.config import load_recipe
from ip2p.evaluation.exact_edits import attribute_accuracy
from ip2p.images import encode_image, to_uint8
from ip2p.models.components import embedded_folder
from ip2p.pairs.painter import PaintPairs
from ip2p.pairs.sampling import PairTexts, SamplerSettings, sample_pairs
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import caption_of, sample_wording
from ip2p.postcards.reader import load_reader, read

PICTURE_SET = 77


def paint_captions(painter: PaintPairs, captions: list[str], guidance: float, steps: int) -> torch.Tensor:
    """``(n, 3, 64, 64)`` in [0, 1], an even number of captions: two a call, each from its own noise row's pair."""
    images = []
    settings = SamplerSettings(**{**painter.settings.__dict__, "steps": steps, "p2p_mode": "off"})
    for start in range(0, len(captions), 16):
        part = captions[start : start + 16]
        states = torch.stack([painter._text_state(painter._token_ids(text)) for text in part])
        texts = PairTexts(states.view(len(part) // 2, 2, *states.shape[1:]), painter.null_state, None)
        seeds = list(range(start, start + len(part) // 2))
        latents, _ = sample_pairs(
            painter.model.unet, texts, seeds=seeds, p2p_thresholds=[0.0] * len(seeds),
            guidance_scales=[guidance] * len(seeds), settings=settings,
        )  # fmt: skip
        images.append(painter.decode(latents.flatten(0, 1)))
    return torch.cat(images)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="pictures, even (default %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="guidance scales to try")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seen", action="store_true", help="captions of combinations seen in training instead")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    painter = PaintPairs(load_recipe("postcard"))
    reader = load_reader(embedded_folder("reader"))
    scenes = [scene_of(PICTURE_SET, i, not args.seen) for i in range(args.count)]
    captions = [caption_of(s, sample_wording(np.random.default_rng((PICTURE_SET, i)))) for i, s in enumerate(scenes)]
    results = []
    for guidance in args.guidance:
        started = time.monotonic()
        with torch.inference_mode():
            images = paint_captions(painter, captions, guidance, args.steps)
        accuracy = attribute_accuracy(read(reader, images * 2 - 1), scenes)
        results.append({"guidance": guidance, "seconds": round(time.monotonic() - started, 1), **accuracy})
        print(
            "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in results[-1].items()),
            flush=True,
        )
    args.output.mkdir(parents=True, exist_ok=True)
    tiles = to_uint8(images[:60].permute(0, 2, 3, 1).numpy())
    sheet = np.concatenate(
        [np.concatenate(list(tiles[i : i + 12]), axis=1) for i in range(0, len(tiles) // 12 * 12, 12)]
    )
    (args.output / "postcard_pictures.png").write_bytes(encode_image(sheet.repeat(2, 0).repeat(2, 1)))
    (args.output / "postcard_pictures.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
