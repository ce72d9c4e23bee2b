#!/usr/bin/env python3
"""The paper's two ablations on postcards: without the CLIP filter, and with a tenth of the data (figure 10).

    python -m ip2p postcard --triplets 3000 --pictures --output build/ablations/triplets.jsonl
    python jobs/datagen.py --recipe postcard-corpus --set seed=11 --triplets build/ablations/triplets.jsonl \\
        --prompts 3000 --output build/ablations/run
    python bench/ablations.py --corpus build/ablations/run --triplets build/ablations/triplets.jsonl --prompts 3000

Three edit models are trained for as many steps from the same base: on the corpus, on a run over the first tenth of its
prompts, and on as many pairs of the same prompts that no filter has seen. Each takes the exam and is drawn as the
paper's curve. Painting and training go on where they stopped when the command is run again (an hour on two cores).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ip2p.evaluation.trade_off import draw_curves

ROOT = Path(__file__).resolve().parent.parent
NO_FILTER = [f"filter.min_{name}=-2" for name in ("original", "edited", "image", "direction")]


def job(name: str, *words: object) -> None:
    """Run ``jobs/name.py``, which goes on where an earlier run of the same words stopped."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--quiet", *map(str, words)]
    print("+", " ".join(command[1:]), flush=True)
    if subprocess.run(command, env=os.environ | {"RAY_worker_niceness": "0"}).returncode:
        sys.exit(f"jobs/{name}.py failed")


def settings(*pairs: object) -> list[object]:
    return [word for pair in pairs for word in ("--set", pair)]


def paint(args: argparse.Namespace, output: Path, prompts: int, *more: str) -> None:
    words = ["--recipe", "postcard-corpus", "--triplets", args.triplets, "--prompts", prompts, "--output", output]
    job("datagen", *words, *settings(f"seed={args.seed}", *more))


def measure(args: argparse.Namespace, run: Path, folder: Path) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Train on ``run``; the number of its pairs, what the exam says, and the points of the curve."""
    training = folder / "training"
    fixed = settings(f"base={args.base}", f"steps={args.steps}", f"checkpoint_every={max(1, args.steps // 3)}")
    job("train", "--cache-latents", "--pairs", run, "--output", training, *fixed)
    pairs = json.loads((training / "summary.json").read_text())["pairs"]
    for name, words in {"exam": ["--methods", "ours"], "curve": ["--curve"]}.items():
        examples = ["--examples", args.examples if name == "exam" else args.curve_examples]
        job("evaluate", "--model", training / "model", "--output", folder / name, *examples, *words)
    exam, curve = (json.loads((folder / name / "summary.json").read_text())[name] for name in ("exam", "curve"))
    return pairs, exam["ours"], curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="finished run of the recipe postcard-corpus")
    parser.add_argument("--triplets", type=Path, required=True, help="the file that it was made from, with pictures")
    parser.add_argument("--prompts", type=int, required=True, help="its prompts")
    parser.add_argument("--seed", type=int, default=11, help="its seed (default %(default)s)")
    parser.add_argument("--base", default="embedded", help="of each training (default: the text-to-image model)")
    parser.add_argument("--steps", type=int, default=1500, help="of each training (default %(default)s)")
    parser.add_argument("--examples", type=int, default=300, help="of the exam (default %(default)s)")
    parser.add_argument("--curve-examples", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("out/bench/ablations"))
    args = parser.parse_args()
    tenth, unfiltered = args.output / "tenth" / "run", args.output / "unfiltered" / "run"
    paint(args, tenth, args.prompts // 10)
    # One candidate a prompt: about as many pairs as the filter leaves of four.
    paint(args, unfiltered, args.prompts, "pairs.candidates=1", "pairs.candidates_per_call=1", *NO_FILTER)
    runs = {"all pairs": args.corpus, "a tenth of the prompts": tenth, "no CLIP filter": unfiltered}
    results, curves = {}, {}
    for name, run in runs.items():
        pairs, exam, curve = measure(args, run, args.output / name.replace(" ", "_"))
        results[name], curves[f"{name} ({pairs} pairs)"] = {"pairs": pairs, **exam}, curve
        print(name, json.dumps({"pairs": pairs, "success": exam["success"]}), flush=True)
    (args.output / "ablations.json").write_text(json.dumps({"exam": results, "curves": curves}, indent=1) + "\n")
    draw_curves(curves, args.output / "ablations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
