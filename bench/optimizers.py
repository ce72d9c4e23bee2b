#!/usr/bin/env python3
"""AdamW beside Muon: the loss on held-out pairs that each comes to in the same time from the same base and pairs.

    python bench/optimizers.py --pairs out/run --seconds 240

A few steps of each tell how long one takes; then each is given as many as fill the time, with the learning rate falling
to 0 at its last. Latents are encoded once for all. Held-out losses are of the averaged weights, by band of timesteps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.ablations import job, settings
from ip2p.training.recipe import OPTIMIZERS

EMA_DECAY = 0.98  # a usual 0.999 would show where a minute of training began rather than where it came to
TRIED = 40  # steps of each to begin with; the second half is timed


def trained(args: argparse.Namespace, optimizer: str, steps: int, output: Path, look: bool) -> list[dict[str, Any]]:
    """What a training of ``steps`` told of itself, one record a report."""
    fixed = settings(
        f"base={args.base}", f"optimizer={optimizer}", f"learning_rate={args.learning_rate}", f"steps={steps}",
        f"warmup={args.warmup}", f"global_batch={args.batch}", f"micro_batch={args.batch}", f"checkpoint_every={steps}",
        f"ema_decay={EMA_DECAY}",
    )  # fmt: skip
    words = ["--cache-latents", args.output / "cache", "--workers", 1, "--report-every", TRIED // 2]
    job("train", "--pairs", *args.pairs, "--output", output, *words, "--look-every", steps if look else 0, *fixed)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def measure(args: argparse.Namespace, optimizer: str) -> dict[str, Any]:
    rate = trained(args, optimizer, TRIED, args.output / f"tried-{optimizer}", look=False)[-1]["samples_per_s"]
    steps = max(1, round(args.seconds * rate / args.batch))
    told = trained(args, optimizer, steps, args.output / optimizer, look=True)
    rates = [one["samples_per_s"] for one in told[1:]] or [rate]  # the first report has the start in it
    return {
        "steps": steps,
        "samples_per_s": sum(rates) / len(rates),
        "held_out_loss": told[-1]["held_out_loss"],
        "held_out_by_band": told[-1]["held_out_by_band"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True, help="run folders with a val split")
    parser.add_argument("--base", default="embedded", help="of both (default: the text-to-image model)")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training each (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of both (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=30, help="steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples a step (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/bench/optimizers"), help="emptied first")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output = args.output.absolute()
    results = {optimizer: measure(args, optimizer) for optimizer in OPTIMIZERS}
    text = json.dumps(results, indent=1)
    (args.output / "result.json").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
