#!/usr/bin/env python3
"""Writing triplets: tokens a second of the batched path against a plain ``generate`` loop, and what can be used.

    python bench/triplet_writing.py --model out/writer/model --captions 64    # open-ended captions
    python bench/triplet_writing.py --captions 600      # the embedded writer, held-out postcards

Both paths write for the same captions in one process, with one number of threads, by the same settings. The plain loop
is transformers' ``generate``, a caption at a time, stopped at the format's end mark. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from ip2p.config import EMBEDDED, load_recipe
from ip2p.postcards.captions import postcard_captions
from ip2p.triplets.assembly import default_writing, language_model_stage
from ip2p.triplets.captions import CaptionRow, read_captions
from ip2p.triplets.edit_types import edit_types
from ip2p.triplets.format import STOP, prompt_of
from ip2p.triplets.language_model import LanguageModelWriter
from ip2p.triplets.shares import parse_shares, within_shares
from ip2p.triplets.writing import WritingRun

OPEN_CAPTIONS = Path(__file__).resolve().parent.parent / "tests/unit/triplets/held_out_captions.txt"
LOOP_CAPTIONS = 24


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="folder of a writer (default: the embedded one)")
    parser.add_argument("--captions", type=int, default=100, help="(default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="(default %(default)s: types as they were learnt)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="out/bench/triplet_writing.json")
    return parser.parse_args()


def captions_of(args: argparse.Namespace) -> list[CaptionRow]:
    if args.model == EMBEDDED:
        return postcard_captions(args.captions, 3, held_out=True).rows
    return read_captions(str(OPEN_CAPTIONS), args.captions, given=False).rows


def speed(writer: LanguageModelWriter, prompts: list[str]) -> dict[str, float]:
    """Tokens written a second: all prompts together, and some of them one after the other by ``generate``."""
    writer.tokens_written = 0
    began = time.perf_counter()
    writer.complete(prompts, [("bench", i) for i in range(len(prompts))])
    batched = writer.tokens_written / (time.perf_counter() - began)
    tokens, began = 0, time.perf_counter()
    texts = writer.triplets
    for place, prompt in enumerate(prompts[:LOOP_CAPTIONS]):
        torch.manual_seed(place)
        ids = torch.tensor([writer.manner.token_ids(writer.tokenizer, prompt)])
        output = writer.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=texts.temperature,
            top_k=0, top_p=texts.top_p, max_new_tokens=texts.max_tokens, stop_strings=[STOP],
            tokenizer=writer.tokenizer, pad_token_id=writer.tokenizer.eos_token_id,
        )  # fmt: skip
        tokens += output.shape[1] - ids.shape[1]
    return {"batched_tokens_per_s": batched, "loop_tokens_per_s": tokens / (time.perf_counter() - began)}


def usable(run: WritingRun, writer: LanguageModelWriter, captions: list[CaptionRow], tries: int) -> dict[str, object]:
    """Shares of captions with a valid triplet after ``tries``, of types, and how many stay when types are made even."""
    import dataclasses

    recipe = dataclasses.replace(run.recipe, triplets=dataclasses.replace(run.recipe.triplets, tries=tries))
    rows = language_model_stage(WritingRun(recipe, run.writing), "cpu", writer)(captions)
    tasks = [row["task"] for row in rows if row["status"] == "accepted"]
    shares = parse_shares("even", edit_types(run.writing.types).names)
    stays = within_shares(tasks, shares, run.writing.share_tolerance)
    kept = Counter(itertools.compress(tasks, stays))
    total = max(1, sum(kept.values()))
    return {
        "valid_rate": len(tasks) / len(rows),
        "by_reason": dict(Counter(row["reason"] for row in rows)),
        "by_task": dict(sorted(Counter(tasks).items())),
        "kept_for_even_shares": total,
        "share_over_even": {task: round(kept[task] / total / share, 2) for task, share in shares.items()},
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    settings = [f"triplets.temperature={args.temperature}", "triplets.max_tokens=96", f"models.triplet_lm={args.model}"]
    recipe = load_recipe("postcard", settings)
    run = WritingRun(recipe, default_writing(recipe))
    run = WritingRun(recipe, type(run.writing)(types=run.writing.types, shares="even"))
    writer = LanguageModelWriter(args.model, recipe.triplets, 0, "cpu")
    captions = captions_of(args)
    names = edit_types(run.writing.types).names if writer.manner.tasks else ("",)
    prompts = [prompt_of(row.caption, task) for row, task in zip(captions, itertools.cycle(names))]
    found: dict[str, object] = {"model": args.model, "captions": len(captions), "threads": args.threads}
    found |= speed(writer, prompts)
    for tries in (1, recipe.triplets.tries):
        found[f"after_{tries}_tries"] = usable(run, writer, captions, tries)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:24} {value:.1f}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
