#!/usr/bin/env python3
"""Train the postcard family from its own drawings: ``python jobs/pretrain.py --output build/weights``.

Stages in order: vae, clip, latents, unet, lm, reader, save. Each goes on from its last checkpoint, so the command may
be stopped at any time and run again. On two CPU cores the defaults take about three hours; on one GPU, minutes.
One more stage, edit_model, takes in a model that jobs/train.py made with the others; `make weights` does all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = ("text_to_image", "clip", "triplet_lm", "reader")
STAGES = ("vae", "clip", "latents", "unet", "lm", "reader", "save")
TAKE_IN = "edit_model"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("build/weights"),
        help="folder for the family's four parts (default %(default)s)",
    )
    add("--work", type=Path, default=Path("build/pretrain"), help="checkpoints and drawings (default %(default)s)")
    add("--start", type=Path, default=None, help="go on from the weights of this family instead of from nothing")
    add(
        "--hold", action="store_true", help="what the UNets of --start see stays: latents near, the text tower as it is"
    )
    add("--lr-scale", type=float, default=1.0, help="times every stage's learning rate (default %(default)s)")
    add("--stages", default=",".join(STAGES), help="comma-separated, in order (default %(default)s)")
    add("--edit-model", type=Path, default=None, metavar="DIR", help="model of jobs/train.py, for stage edit_model")
    add("--device", default="auto", help="cpu, cuda or auto (default)")
    add("--threads", type=int, default=0, help="CPU threads, 0 = all cores (default)")
    add("--drawings", type=int, default=100_000, help="drawings in the training set (default %(default)s)")
    add("--vae-steps", type=int, default=10_500, help="of 16 drawings (default %(default)s)")
    add("--clip-steps", type=int, default=700, help="of 192 drawings and edits (default %(default)s)")
    add("--unet-steps", type=int, default=8900, help="of 64 latents (default %(default)s)")
    add("--lm-steps", type=int, default=3000, help="of 32 triplets (default %(default)s)")
    add("--reader-steps", type=int, default=14_000, help="of 64 drawings (default %(default)s)")
    args = parser.parse_args(argv)
    unknown = set(args.stages.split(",")) - {*STAGES, TAKE_IN}
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; known: {', '.join((*STAGES, TAKE_IN))}")
    if args.hold and not (args.start and args.start.resolve() != args.output.resolve()):
        parser.error("--hold needs --start, the family whose latents and texts are held, and another --output")
    if (args.edit_model is None) != (TAKE_IN not in args.stages.split(",")):
        parser.error(f"--edit-model and --stages {TAKE_IN} need each other")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if args.start:
        start_from(args.start, args.work)
    stages = args.stages.split(",")
    for stage in (*STAGES, TAKE_IN):
        if stage in stages:
            print(f"== {stage}", flush=True)
            globals()[f"run_{stage}"](args, device)
    return 0


def start_from(family: Path, work: Path) -> None:
    """Make ``family`` the step 0 of every part that has no checkpoint in ``work`` yet."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from ip2p.models.checkpoint import read_manifest
    from ip2p.postcards.family.autoencoder import new_autoencoder
    from ip2p.postcards.family.clip import new_clip
    from ip2p.postcards.family.fitting import save_start
    from ip2p.postcards.family.text_to_image import new_unet
    from ip2p.postcards.family.tokenizer import copy_tokenizer
    from ip2p.postcards.reader import AttributeReader

    copy_tokenizer(family / "text_to_image" / "tokenizer", work / "tokenizer")
    parts = {
        "vae": (new_autoencoder(), "text_to_image/vae/diffusion_pytorch_model.safetensors"),
        "unet": (new_unet(), "text_to_image/unet/diffusion_pytorch_model.safetensors"),
        "clip": (new_clip(_vocabulary(work)), "clip/open_clip_model.safetensors"),
        "reader": (AttributeReader(), "reader/model.safetensors"),
    }
    for name, (module, file) in parts.items():
        if not (work / f"{name}.pt").exists():
            module.load_state_dict(load_file(family / file))
            save_start(work / f"{name}.pt", module)
    about = read_manifest(family / "text_to_image")["about"]
    (work / "continues.json").write_text(json.dumps(about, indent=1) + "\n")
    if not (work / "triplet_lm.pt").exists():
        AutoTokenizer.from_pretrained(family / "triplet_lm").save_pretrained(work / "lm_tokenizer")
        save_start(work / "triplet_lm.pt", GPT2LMHeadModel.from_pretrained(family / "triplet_lm").float())


def _vocabulary(work: Path) -> int:
    return len(json.loads((work / "tokenizer" / "vocab.json").read_text()))


def _drawings(args: argparse.Namespace):
    from ip2p.postcards.family.drawings import cached_drawings

    return cached_drawings(args.work, args.drawings)


def run_vae(args: argparse.Namespace, device: str) -> None:
    from ip2p.postcards.family.autoencoder import train_autoencoder
    from ip2p.postcards.family.fitting import Schedule

    schedule = Schedule(args.vae_steps, 16, 2e-3 * args.lr_scale, warmup=200)
    train_autoencoder(args.work, _drawings(args), schedule, device, _held(args, device))


def _held(args: argparse.Namespace, device: str):
    """The autoencoder whose latents are held, if any are."""
    if not args.hold:
        return None
    from diffusers import AutoencoderKL

    held = AutoencoderKL.from_pretrained(args.start / "text_to_image" / "vae").float().requires_grad_(False)
    return held.eval().to(device)


def run_clip(args: argparse.Namespace, device: str) -> None:
    from ip2p.postcards.family.clip import train_clip
    from ip2p.postcards.family.fitting import Schedule

    schedule = Schedule(args.clip_steps, 192, 1e-3 * args.lr_scale, weight_decay=0.05)
    train_clip(args.work, _drawings(args), schedule, device, hold_text=args.hold)


def run_latents(args: argparse.Namespace, device: str) -> None:
    import torch

    from ip2p.postcards.family.autoencoder import encode_all

    path, vae_step = args.work / "latents.pt", _step(args.work, "vae")
    if not path.exists() or torch.load(path, weights_only=True, mmap=True).get("vae_step") != vae_step:
        means, stds = encode_all(trained_vae(args.work).to(device), _drawings(args))
        torch.save({"means": means.half(), "stds": stds.half(), "vae_step": vae_step}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)  # noqa: PTH105


def run_unet(args: argparse.Namespace, device: str) -> None:
    from transformers import CLIPTokenizer

    from ip2p.postcards.family.clip import text_encoder_of
    from ip2p.postcards.family.fitting import Schedule
    from ip2p.postcards.family.text_to_image import scaling_factor_of, train_text_to_image

    means, stds = trained_latents(args.work)
    text_encoder: typing.Any = text_encoder_of(trained_clip(args.work))
    train_text_to_image(
        args.work, _drawings(args), (means, stds), scaling_factor_of(means),
        CLIPTokenizer.from_pretrained(args.work / "tokenizer"),
        text_encoder.to(device).requires_grad_(False),
        Schedule(args.unet_steps, 64, 1e-3 * args.lr_scale, warmup=300), device,
    )  # fmt: skip


def run_lm(args: argparse.Namespace, device: str) -> None:
    from ip2p.postcards.family.fitting import Schedule
    from ip2p.postcards.family.triplet_lm import train_triplet_lm

    train_triplet_lm(args.work, Schedule(args.lm_steps, 32, 2e-3 * args.lr_scale), device)


def run_reader(args: argparse.Namespace, device: str) -> None:
    from ip2p.postcards.family.attribute_reader import train_reader
    from ip2p.postcards.family.fitting import Schedule

    train_reader(args.work, _drawings(args), Schedule(args.reader_steps, 64, 2e-3 * args.lr_scale), device)


def run_save(args: argparse.Namespace, device: str) -> None:
    from ip2p.models.checkpoint import write_manifest
    from ip2p.postcards.family.attribute_reader import save_reader
    from ip2p.postcards.family.clip import save_clip, text_encoder_of
    from ip2p.postcards.family.text_to_image import save_text_to_image, scaling_factor_of
    from ip2p.postcards.family.triplet_lm import save_triplet_lm
    from ip2p.postcards.reader import AttributeReader

    clip, vae = trained_clip(args.work), trained_vae(args.work)
    vae.register_to_config(scaling_factor=scaling_factor_of(trained_latents(args.work)[0]))
    unet = trained_unet(args.work)
    for part in PARTS:
        shutil.rmtree(args.output / part, ignore_errors=True)
    save_text_to_image(args.output / "text_to_image", unet, vae, text_encoder_of(clip), args.work / "tokenizer")
    save_clip(clip, args.work / "tokenizer", args.output / "clip")
    save_triplet_lm(trained_lm(args.work), args.work / "lm_tokenizer", args.output / "triplet_lm")
    save_reader(_average(args.work, "reader", AttributeReader()), args.output / "reader")
    about = {"made_by": "jobs/pretrain.py", "device": device, "steps": _steps(args.work)}
    if (args.work / "continues.json").exists():
        about["continues"] = json.loads((args.work / "continues.json").read_text())
    for part in PARTS:
        write_manifest(args.output / part, about)
    print(f"{args.output}: {sum(f.stat().st_size for f in args.output.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def run_edit_model(args: argparse.Namespace, device: str) -> None:
    from ip2p.postcards.family.edit_model import take_in_edit_model

    take_in_edit_model(args.edit_model, args.output)


def _steps(work: Path) -> dict[str, int]:
    return {name: _step(work, name) for name in ("vae", "clip", "unet", "triplet_lm", "reader")}


def _step(work: Path, name: str) -> int:
    import torch

    return int(torch.load(work / f"{name}.pt", weights_only=True, mmap=True)["step"])


def _average(work: Path, name: str, module):
    """``module`` with the moving average of checkpoint ``name``."""
    import torch

    state = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)
    module.load_state_dict(state["average"])
    return module.eval()


def trained_vae(work: Path):
    from ip2p.postcards.family.autoencoder import new_autoencoder

    return _average(work, "vae", new_autoencoder())


def trained_clip(work: Path):
    from ip2p.postcards.family.clip import new_clip

    return _average(work, "clip", new_clip(_vocabulary(work)))


def trained_unet(work: Path):
    from ip2p.postcards.family.text_to_image import new_unet

    return _average(work, "unet", new_unet())


def trained_lm(work: Path):
    from transformers import AutoTokenizer

    from ip2p.postcards.family.triplet_lm import new_triplet_lm

    tokenizer = AutoTokenizer.from_pretrained(work / "lm_tokenizer")
    return _average(work, "triplet_lm", new_triplet_lm(len(tokenizer), tokenizer.pad_token_id))


def trained_latents(work: Path):
    import torch

    state = torch.load(work / "latents.pt", weights_only=True)
    return state["means"].float(), state["stds"].float()


if __name__ == "__main__":
    sys.exit(main())
