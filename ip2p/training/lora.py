"""Training few weights instead of all: low-rank additions to the attention projections (LoRA, by peft).

``conv_in`` is trained whole beside them: its new channels start at zero, and nothing else can make the UNet look at
the original image.
"""

from __future__ import annotations

import importlib.util
import typing

import torch

from ip2p.errors import InputError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def check_peft() -> None:
    """Raise InputError where peft is not there."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora_rank needs the package peft: `pip install peft`, or `--set lora_rank=0`")


def add_lora(unet: typing.Any, rank: int, seed: int) -> None:
    """Freeze ``unet`` and add trainable layers of ``rank``; at first they change nothing. InputError without peft."""
    check_peft()
    from peft import LoraConfig

    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
        )
    unet.conv_in.requires_grad_(True)


def merge_lora(unet: typing.Any) -> None:
    """Fold the additions into the weights they belong to, so that the UNet can be saved as any other."""
    unet.fuse_lora()
    unet.unload_lora()
