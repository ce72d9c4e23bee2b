#!/usr/bin/env python3
"""The sd15 recipe at full size with random weights: proves shapes, memory and time without any download.

    python bench/sd15_shapes.py --models out/sd15-random --steps 2

Writes a diffusers folder of Stable Diffusion 1.5's shapes and an open_clip ViT-L/14 (4.3 GB in fp16), then runs
``jobs/datagen.py --recipe sd15`` on one triplet at 512 pixels. The pictures are noise, of course.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
CLIP = "ViT-L-14-quickgelu"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNET: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
}  # fmt: skip
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "scaling_factor": 0.18215,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407,
    "bos_token_id": 49406, "pad_token_id": 49407,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip


def write_models(folder: Path) -> None:
    """Random fp16 weights in the two layouts that the recipe reads."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    base = folder / "text_to_image"
    makers = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    for name, make in makers.items():
        model: Any = make()
        model.half().save_pretrained(base / name, safe_serialization=True)
    (base / "scheduler").mkdir(exist_ok=True)
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    write_clip_tokenizer(base / "tokenizer")
    write_clip(folder / "clip")


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's own vocabulary, which open_clip ships, in transformers' two files."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {theirs.get(word, word): number for word, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    merges = sorted(tokenizer.bpe_ranks, key=lambda pair: tokenizer.bpe_ranks[pair])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_clip(folder: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    model = open_clip.create_model(CLIP, pretrained=None, load_weights=False)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": open_clip.get_model_config(CLIP), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("out/sd15-random"), help="where the random weights go")
    parser.add_argument("--steps", type=int, default=2, help="sampler steps (default %(default)s)")
    parser.add_argument("--candidates", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="float32 (CPU), bfloat16 or float16 (GPU)")
    parser.add_argument("--output", type=Path, default=Path("out/bench/sd15_run"))
    args = parser.parse_args()
    if not (args.models / "clip" / "open_clip_model.safetensors").exists():
        write_models(args.models)
    triplets = args.models / "triplets.jsonl"
    triplets.write_text(json.dumps({"input": "a photograph of a castle", "edit": "make it night",
                                    "output": "a photograph of a castle at night"}) + "\n")  # fmt: skip
    models = args.models.resolve()
    settings = {
        "models.text_to_image": models / "text_to_image", "models.clip": models / "clip",
        "pairs.steps": args.steps, "pairs.candidates": args.candidates, "models.dtype": args.dtype,
        "filter.min_original": -1, "filter.min_edited": -1, "filter.min_image": -1, "filter.min_direction": -1,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "jobs" / "datagen.py"), "--recipe", "sd15", "--triplets", str(triplets),
               "--output", str(args.output), "--json"]  # fmt: skip
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    started = time.monotonic()
    code = subprocess.run(command).returncode
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"exit code {code}, {time.monotonic() - started:.0f} s, largest process {peak_gb:.1f} GiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
