#!/usr/bin/env python3
"""Training steps at Stable Diffusion 1.5's size with random weights: memory, time, and the share of a GPU's peak.

    python bench/sd15_training.py --base out/sd15-random/text_to_image        # one sample of 256 pixels, on the CPU
    python bench/sd15_training.py --batch 32 --steps 20 --precision bfloat16 --peak 989   # on an H100 or H200

The base is what `python bench/sd15_shapes.py` writes. A step is what jobs/train.py's workers run: draws, dropout, loss,
backward, clipping, AdamW, EMA, all in float32 but for the UNet's arithmetic. ``gain_of_cache`` is how many times as
long a step is that encodes its own pictures and instructions, as those of diffusers' script do.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from ip2p.models.components import EditModel, load_base
from ip2p.training.encoding import PairEncoder
from ip2p.training.loop import micro_batches, train_step
from ip2p.training.loss import noise_schedule
from ip2p.training.order import Order
from ip2p.training.pair_columns import PairColumns
from ip2p.training.recipe import TrainingRecipe, load_training_recipe
from ip2p.training.state import start_training


class OnePair:
    """A pair of random pictures as often as asked; ``encoding_s`` is what encoding a batch of pairs takes."""

    def __init__(self, base: EditModel, resolution: int, batch: int):
        encoder = PairEncoder(base.vae, base.text_encoder, base.tokenizer)
        pictures = np.random.default_rng(0).integers(0, 256, (2, resolution, resolution, 3), dtype=np.uint8)
        null = encoder.texts([""])
        for _ in range(2):  # the second time counts
            started = time.monotonic()
            means, stds = encoder.posterior(np.repeat(pictures, batch, axis=0))
            states = encoder.texts([f"make it night {number}" for number in range(batch)])
            float(means.mean() + states.mean())  # waits for the device
            self.encoding_s = time.monotonic() - started
        self.columns = PairColumns(means[:1], stds[:1], means[-1:], states[:1])
        self.null_state = null[0]
        self.latent_shape = tuple(means.shape[1:])

    def __len__(self) -> int:
        return 1

    def rows(self, indices: np.ndarray, flips: np.ndarray) -> PairColumns:
        return PairColumns(*(column.expand(len(indices), *column.shape[1:]) for column in vars(self.columns).values()))


def forward_flops(unet: Any, latent_shape: tuple[int, ...], text_shape: torch.Size) -> int:
    """Of one sample through the UNet."""
    from torch.utils.flop_counter import FlopCounterMode

    sample = torch.zeros((1, 2 * latent_shape[0], *latent_shape[1:]), device=unet.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(sample, torch.zeros(1, device=unet.device), encoder_hidden_states=torch.zeros(text_shape).to(unet.device))
    return counter.get_total_flops()


def measure(args: argparse.Namespace, recipe: TrainingRecipe) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(recipe.base, device)
    source: Any = OnePair(base, recipe.resolution, recipe.global_batch)
    schedule = noise_schedule(base.scheduler_config, base.vae.config).to(device)
    state = start_training(base.unet, recipe, args.gradient_checkpointing)
    flops = forward_flops(state.unet, source.latent_shape, source.columns.text_states.shape)
    order = Order(1, recipe.global_batch, 0)
    seconds = []
    for step in range(args.steps + 1):
        batches = micro_batches(source, order, recipe, step)
        started = time.monotonic()
        loss = train_step(state, batches, schedule).losses.mean().item()  # waits for the device
        seconds.append(time.monotonic() - started)
        print(f"step {step}: loss {loss:.4f}, {seconds[-1]:.1f} s", flush=True)
    steady = seconds[1:] or seconds
    rate = len(steady) * recipe.global_batch / sum(steady)
    step_s = recipe.global_batch / rate
    done = 3 * flops * rate / 1e12  # backward is twice forward; what checkpointing repeats is not counted
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "precision": recipe.precision,
        "resolution": recipe.resolution, "batch": recipe.global_batch, "samples_per_s": round(rate, 3),
        "encoding_s_per_pair": round(source.encoding_s / recipe.global_batch, 3),
        "gain_of_cache": round(1 + source.encoding_s / step_s, 2),
        "gflop_forward": round(flops / 1e9), "tflop_per_s": round(done, 2),
        "share_of_peak": round(done / args.peak, 3) if args.peak else None,
        "process_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "gpu_gib": round(memory / 2**30, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default="out/sd15-random/text_to_image", help="diffusers folder (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="samples a step, in one UNet call (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="after a first one that is not counted")
    parser.add_argument("--resolution", type=int, default=256, help="pixels (default %(default)s)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device at this precision")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    settings = {"base": args.base, "global_batch": args.batch, "micro_batch": args.batch, "precision": args.precision,
                "resolution": args.resolution}  # fmt: skip
    result = measure(args, load_training_recipe("sd15", [f"{name}={value}" for name, value in settings.items()]))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "sd15_training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
