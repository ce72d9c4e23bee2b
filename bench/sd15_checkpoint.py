#!/usr/bin/env python3
"""An edit model of Stable Diffusion 1.5's shapes to an original .ckpt and back, every tensor compared bit by bit.

    python bench/sd15_checkpoint.py --output out/bench/sd15_checkpoint

Random float32 weights (1.07 billion numbers) as a diffusers folder become one file in the original's layout, then a
pickled .ckpt as the original's training writes it, then a folder, then a file again, all by `ip2p weights convert`.
Prints bytes, seconds and the peak memory of each step; exit code 1 where a tensor differs or a step takes more memory
than --most-gib. Needs 22 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.sd15_shapes import ROOT, SCHEDULER, TEXT, UNET, VAE, write_clip_tokenizer

PARTS = ("unet", "vae", "text_encoder")


def write_model(folder: Path) -> None:
    """An edit model (8 image channels) of random float32 weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ip2p.models.checkpoint import write_manifest
    from ip2p.models.export import model_index

    torch.manual_seed(0)
    makers: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel(**{**UNET, "in_channels": 8}),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    for name, make in makers.items():
        make().save_pretrained(folder / name, safe_serialization=True)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(model_index()))
    write_clip_tokenizer(folder / "tokenizer")
    write_manifest(folder)


def pickled(source: Path, target: Path) -> None:
    """A .ckpt as the original's training leaves it: a pickle with the tensors below ``state_dict``."""
    import torch
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(source), "global_step": 0}, target)


def differing(one: Path, other: Path) -> Iterator[str]:
    """Names of tensors that two safetensors files do not both have with the same type, shape and bits."""
    import torch
    from safetensors import safe_open

    with safe_open(one, framework="pt") as left, safe_open(other, framework="pt") as right:
        names = set(left.keys()), set(right.keys())
        yield from sorted(names[0] ^ names[1])
        for name in sorted(names[0] & names[1]):
            a, b = left.get_tensor(name), right.get_tensor(name)
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
                yield name


def tensors_of(path: Path) -> list[Path]:
    """The files that hold the weights of a folder, or the file itself, in the order of PARTS."""
    return [path] if path.is_file() else [next((path / part).glob("*.safetensors")) for part in PARTS]


def step(name: str, made: Path, command: list[str]) -> dict[str, Any]:
    """Run ``command`` in a process of its own, for its own memory; one line of the table."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name}: ended with {process.returncode}")
    size = sum(path.stat().st_size for path in tensors_of(made))
    # Of the largest of its processes: they do not hold weights at the same time.
    row = {"step": name, "bytes": size, "seconds": time.monotonic() - started, "peak_gib": usage.ru_maxrss / 2**20}
    print(f"{name:28} {size / 1e9:6.2f} GB {row['seconds']:7.1f} s {row['peak_gib']:6.2f} GiB", flush=True)
    return row


def round_trip(place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The steps, and the names of all tensors that are not what they were."""
    folder, file, ckpt, back, again = (
        place / name for name in ("model", "original.safetensors", "original.ckpt", "back", "again.safetensors")
    )
    this, convert = str(Path(__file__).resolve()), ["-m", "ip2p", "weights", "convert"]
    rows = [
        step("random weights", folder, [this, "--only", "write", "--output", str(folder)]),
        step("folder to .safetensors", file, [*convert, str(folder), str(file)]),
        step(".safetensors to .ckpt", ckpt, [this, "--only", "pickle", "--output", str(file)]),
        step(".ckpt to folder", back, [*convert, str(ckpt), str(back), "--base", str(folder)]),
    ]
    ckpt.unlink()
    rows.append(step("folder to .safetensors again", again, [*convert, str(back), str(again)]))
    pairs = [*zip(tensors_of(folder), tensors_of(back), strict=True), (file, again)]
    return rows, [f"{other}: {name}" for one, other in pairs for name in differing(one, other)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/bench/sd15_checkpoint"), help="a folder to work in")
    parser.add_argument("--most-gib", type=float, default=14.0, help="of memory, of any step (default %(default)s)")
    parser.add_argument("--only", choices=("write", "pickle"), help=argparse.SUPPRESS)  # a step in its own process
    args = parser.parse_args()
    if args.only == "write":
        write_model(args.output)
        return 0
    if args.only == "pickle":
        pickled(args.output, args.output.with_suffix(".ckpt"))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    place = args.output.resolve() / "weights"
    place.mkdir()
    try:
        rows, wrong = round_trip(place)
    finally:
        shutil.rmtree(place)
    report = {"steps": rows, "differing": wrong}
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(wrong)} tensors differ{': ' + ', '.join(wrong[:5]) if wrong else ''}")
    too_much = [row["step"] for row in rows if row["peak_gib"] > args.most_gib]
    if too_much:
        print(f"more than {args.most_gib:g} GiB: {', '.join(too_much)}")
    return 1 if wrong or too_much else 0


if __name__ == "__main__":
    sys.exit(main())
