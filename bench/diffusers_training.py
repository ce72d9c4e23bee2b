#!/usr/bin/env python3
"""Training beside diffusers' own script: the same model, pairs, batch and threads, one after the other in one run.

    python bench/diffusers_training.py --script train_instruct_pix2pix.py --run out/demo

``--script`` is diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py as published for the installed version
or an earlier one; it is not part of the diffusers package. The run is exported by `ip2p export --format hf`, and the
script trains on the export with nothing but its flags. Rates leave out the first steps, in which either side warms up;
`whole_s` is everything, from start to exported model, our latent cache and the start of Ray included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ip2p.config import Models

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"(\d+)/\d+ \[[^\]]*step_loss=([\d.]+)")
WARM_UP = 10  # steps of either side that are not counted


def write_base(folder: Path) -> None:
    """The embedded text-to-image model in float32: the script trains weights in the type they are stored in."""
    from diffusers import DDPMScheduler

    from ip2p.models.components import load_text_to_image

    model = load_text_to_image(Models(), "cpu")
    for name in ("unet", "vae", "text_encoder"):
        getattr(model, name).float().save_pretrained(folder / name, safe_serialization=True)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    DDPMScheduler.from_config(model.scheduler_config).save_pretrained(folder / "scheduler")
    shutil.copy(ROOT / "ip2p/postcards/weights/text_to_image/model_index.json", folder)


def theirs(args: argparse.Namespace, base: Path, export: Path, output: Path) -> dict[str, Any]:
    flags = {
        "pretrained_model_name_or_path": base, "dataset_name": export, "output_dir": output, "resolution": 64,
        "original_image_column": "original_image", "edit_prompt_column": "edit_prompt",
        "edited_image_column": "edited_image", "train_batch_size": args.batch, "max_train_steps": args.steps,
        "checkpointing_steps": args.steps * 2, "learning_rate": args.learning_rate, "lr_warmup_steps": 0,
        "lr_scheduler": "constant", "max_grad_norm": 1, "conditioning_dropout_prob": 0.05, "mixed_precision": "no",
        "seed": 0,
    }  # fmt: skip
    command = [sys.executable, str(args.script.resolve()), "--random_flip", "--use_ema"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    started = time.monotonic()
    times, losses, tail = {}, {}, ""
    with subprocess.Popen(command, env=threads(args), stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stderr is not None
        for line in process.stderr:  # the bar ends its lines by carriage returns, which text mode takes for line ends
            tail = (tail + line)[-3000:]
            for step, loss in STEP.findall(line):
                times.setdefault(int(step), time.monotonic())
                losses.setdefault(int(step), float(loss))
    if process.returncode:
        sys.exit(f"{args.script}: ended with {process.returncode}\n{tail}")
    first, last = min(step for step in times if step >= WARM_UP), max(times)
    rate = (last - first) * args.batch / (times[last] - times[first])
    return {"samples_per_s": rate, "whole_s": time.monotonic() - started, "losses": sorted(losses.items())}


def ours(args: argparse.Namespace, base: Path, output: Path) -> dict[str, Any]:
    settings = {
        "base": base, "steps": args.steps, "global_batch": args.batch, "micro_batch": args.batch // args.workers,
        "learning_rate": args.learning_rate, "schedule": "constant", "warmup": 0, "checkpoint_every": args.steps,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--pairs", args.run, "--output", str(output)]
    command += ["--cache-latents", "--workers", str(args.workers), "--report-every", str(WARM_UP)]
    command += ["--threads", str(args.threads // args.workers), "--look-every", "0", "--quiet"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    started = time.monotonic()
    if subprocess.run(command, env=threads(args)).returncode:
        sys.exit("jobs/train.py failed")
    whole_s = time.monotonic() - started
    told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [args.batch * WARM_UP / one["samples_per_s"] for one in told if one["step"] > WARM_UP]
    losses = [(one["step"], one["loss"]) for one in told]
    return {
        "samples_per_s": len(seconds) * WARM_UP * args.batch / sum(seconds), "whole_s": whole_s, "losses": losses,
    }  # fmt: skip


def threads(args: argparse.Namespace) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(args.threads), "RAY_worker_niceness": "0", "HF_HUB_OFFLINE": "1"}


def averaged(losses: list[tuple[int, float]], width: int) -> tuple[list[float], list[float]]:
    """Means of ``width`` steps at a time, at their middle."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for step, loss in losses:
        groups.setdefault((step - 1) // width, []).append((step, loss))
    middles = [(number + 0.5) * width for number in groups]
    return middles, [sum(loss for _, loss in group) / len(group) for group in groups.values()]


def draw(sides: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, side in sides.items():
        steps, means = averaged(side["losses"], WARM_UP * 2)
        by_step.plot(steps, means, label=f"{name}: {side['samples_per_s']:.0f} samples/s")
        by_time.plot([step * side["batch"] / side["samples_per_s"] for step in steps], means)
    by_step.set(xlabel="optimizer steps", ylabel="loss")
    by_time.set(xlabel="seconds of training")
    by_step.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="train_instruct_pix2pix.py as published")
    parser.add_argument("--run", required=True, help="folder of a finished run with a train split")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: all cores)")
    parser.add_argument("--workers", type=int, default=1, help="ours shares the threads out over so many (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("out/bench/diffusers_training"), help="emptied first")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    base, export = args.output / "base", args.output / "export"
    write_base(base)
    command = [sys.executable, "-m", "ip2p", "export", "--run", args.run, "--output", str(export), "--format", "hf"]
    subprocess.run([*command, "--quiet"], check=True, cwd=ROOT)
    sides = {"diffusers": theirs(args, base, export, args.output / "theirs")}
    sides["ours"] = ours(args, base, args.output / "ours")
    for side in sides.values():
        side["batch"] = args.batch
    ratios = {name: sides["ours"][name] / sides["diffusers"][name] for name in ("samples_per_s", "whole_s")}
    (args.output / "result.json").write_text(json.dumps({**sides, "ours_over_diffusers": ratios}, indent=1) + "\n")
    draw(sides, args.output / "loss.png")
    shown = {name: {k: round(v, 1) for k, v in side.items() if k != "losses"} for name, side in sides.items()}
    print(json.dumps({**shown, "ours_over_diffusers": {k: round(v, 2) for k, v in ratios.items()}}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
