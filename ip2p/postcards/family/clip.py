"""The family's CLIP (open_clip classes): a small ResNet and a three-layer text tower.

Each batch holds drawings *and* their exact edits, so that the loss must tell a red boat from the same boat in blue:
without such neighbours the direction similarity of an edit would mean little. The text tower also conditions the
text-to-image UNet, in transformers' format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ip2p.postcards.family.drawings import Drawings
from ip2p.postcards.family.fitting import Schedule, fit
from ip2p.postcards.family.tokenizer import WINDOW, copy_tokenizer, write_tokenizer
from ip2p.postcards.grammar import caption_of, sample_example, sample_wording
from ip2p.postcards.renderer import render

if TYPE_CHECKING:
    from open_clip import CLIP
    from transformers import CLIPTextModel

MEAN = STD = (0.5, 0.5, 0.5)
WIDTH = 128


def clip_config(vocabulary: int) -> dict[str, object]:
    """An ``open_clip_config.json``; the tokenizer lies beside it."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 20, "patch_size": None}
    text = {
        "context_length": WINDOW, "vocab_size": vocabulary, "width": WIDTH, "heads": 4, "layers": 3,
        "hf_tokenizer_name": "beside this file",  # any name makes open_clip look there
    }  # fmt: skip
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}


def new_clip(vocabulary: int) -> CLIP:
    from open_clip import CLIP

    torch.manual_seed(1)
    return CLIP(**clip_config(vocabulary)["model_cfg"])  # type: ignore[arg-type]


def clip_batch(drawings: Drawings, step: int, batch: int) -> tuple[np.ndarray, list[str]]:
    """Half drawings, half their edits: pixels uint8 ``(batch, 64, 64, 3)`` and one caption each."""
    rng = np.random.default_rng((2, step))
    chosen = rng.integers(len(drawings.pixels), size=batch // 2)
    pixels, captions = [drawings.pixels[i] for i in chosen], []
    edited_captions = []
    for i in chosen:
        example = sample_example(drawings.scene(int(i)), rng)
        captions.append(example.caption)
        # Another wording for the edited caption, so that phrasing carries no information about who belongs together.
        edited_captions.append(caption_of(example.edited_scene, sample_wording(rng)))
        pixels.append(render(example.edited_scene))
    return np.stack(pixels), captions + edited_captions


def train_clip(
    folder: Path, drawings: Drawings, schedule: Schedule, device: str = "cpu", hold_text: bool = False
) -> CLIP:
    """Train from ``drawings`` and their edits. ``hold_text`` leaves the text tower, on which UNets are conditioned."""
    from transformers import CLIPTokenizer

    vocabulary = write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    clip = new_clip(vocabulary).to(memory_format=torch.channels_last).to(device)
    if hold_text:
        clip.requires_grad_(False).visual.requires_grad_(True)

    def loss_of(step: int) -> torch.Tensor:
        pixels, captions = clip_batch(drawings, step, schedule.batch)
        # Trained in the [0, 1] range with MEAN and STD, which is how clip_similarity feeds it.
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(device)
        images = _augmented(images, np.random.default_rng((3, step)))
        texts = tokenizer(captions, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
        image_features = clip.encode_image(images, normalize=True)
        text_features = clip.encode_text(texts["input_ids"].to(device), normalize=True)
        logits = clip.logit_scale.exp().clamp(max=60.0) * image_features @ text_features.T
        labels = torch.arange(len(logits), device=device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return fit("clip", folder, clip, loss_of, schedule)


def _augmented(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A little blur and noise, as the autoencoder and the sampler leave them."""
    if rng.random() < 0.5:
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(images.shape), dtype=np.float32)).to(images.device)
    return images + float(rng.uniform(0, 0.08)) * noise


def save_clip(clip: CLIP, tokenizer_folder: Path, folder: Path) -> None:
    """An open_clip ``local-dir:`` folder: config, fp16 safetensors and the tokenizer it was trained with."""
    vocabulary = len(json.loads((tokenizer_folder / "vocab.json").read_text()))
    copy_tokenizer(tokenizer_folder, folder)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config(vocabulary), indent=2) + "\n")
    weights = {name: _half(value) for name, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def _half(value: torch.Tensor) -> torch.Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous().clone()


def text_encoder_of(clip: CLIP) -> CLIPTextModel:
    """The text tower as transformers' CLIPTextModel, with the same hidden states."""
    from transformers import CLIPTextConfig, CLIPTextModel

    state = clip.state_dict()
    vocabulary, width = state["token_embedding.weight"].shape
    layers = len(clip.transformer.resblocks)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=WINDOW, hidden_act="gelu", projection_dim=width,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    renamed = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    for i in range(layers):
        renamed |= _layer(state, i)
    # transformers 5 flattened the text model; older layouts nest it one level deeper.
    nested = any(name.startswith("text_model.") for name in encoder.state_dict())
    prefix = "text_model." if nested else ""
    missing, unexpected = encoder.load_state_dict({prefix + k: v for k, v in renamed.items()}, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name for name in missing), missing
    return encoder.eval()


def _layer(state: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    old, new = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
    renamed = {}
    for kind in ("weight", "bias"):
        parts = state[f"{old}attn.in_proj_{kind}"].chunk(3)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            renamed[f"{new}self_attn.{name}.{kind}"] = part
        renamed[f"{new}self_attn.out_proj.{kind}"] = state[f"{old}attn.out_proj.{kind}"]
        renamed[f"{new}layer_norm1.{kind}"] = state[f"{old}ln_1.{kind}"]
        renamed[f"{new}layer_norm2.{kind}"] = state[f"{old}ln_2.{kind}"]
        renamed[f"{new}mlp.fc1.{kind}"] = state[f"{old}mlp.c_fc.{kind}"]
        renamed[f"{new}mlp.fc2.{kind}"] = state[f"{old}mlp.c_proj.{kind}"]
    return renamed
