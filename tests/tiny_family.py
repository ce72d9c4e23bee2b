"""A whole model family with random weights, small enough to build in a test: the real classes at tiny size.

    build_tiny_family(folder)  ->  folder/text_to_image  folder/clip  folder/triplet_lm

The layouts are those of the embedded family: a diffusers folder, an open_clip ``local-dir`` folder with its own
tokenizer, a transformers causal LM folder. 16-pixel pictures have 8x8 latents (the VAE halves once).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

TEXTS = """a the red blue green boat castle tree house on in at of night day snow sand water pencil drawing photo
make it turn into with sky moon add remove replace by and sunset"""
TEXT_WIDTH, WINDOW = 32, 77


def build_tiny_family(folder: Path, seed: int = 0) -> None:
    """Write the three folders; the same seed writes the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_text_to_image(folder / "text_to_image")
        build_clip(folder / "clip")
        build_triplet_lm(folder / "triplet_lm")


def build_edit_model(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder whose UNet takes 8 channels; another ``seed``, other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_text_to_image(folder)
    shutil.rmtree(folder / "unet")
    tiny_unet(in_channels=8, seed=seed).save_pretrained(folder / "unet")
    return folder


def build_text_to_image(folder: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_unet().save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=WINDOW, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    scheduler = {
        "_class_name": "EulerAncestralDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    }  # fmt: skip
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def tiny_unet(in_channels: int = 4, seed: int = 0) -> torch.nn.Module:
    """Two resolutions, both with self- and cross-attention in their down, middle and up blocks."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=in_channels, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip
        # With fresh weights attention is nearly uniform, and tests of who attends to whom would see nothing.
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.data *= 4.0
    return unet.eval().requires_grad_(False)


def build_clip(folder: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    text = {
        "context_length": WINDOW, "vocab_size": len(tokenizer), "width": 32, "heads": 4, "layers": 2,
        "hf_tokenizer_name": "tokenizer beside this file", "pool_type": "eos", "eos_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, _model_file(folder))
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    text_to_write = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text_to_write)


def build_triplet_lm(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(), bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def clip_tokenizer():
    """CLIP's tokenizer class on a small vocabulary: bytes and a few words; EOS has the highest id, as in CLIP."""
    from transformers import CLIPTokenizer

    characters = sorted(_byte_characters())
    vocabulary = {token: place for place, token in enumerate([*characters, *(c + "</w>" for c in characters)])}
    merges: list[tuple[str, str]] = []
    for word in TEXTS.split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
                vocabulary.setdefault("".join(merge), len(vocabulary))
            parts = ["".join(merge), *parts[2:]]
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WINDOW)


def _byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<|endoftext|>", "<|pad|>", *sorted(_byte_characters())]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:2])
    return tokenizer


def _byte_characters() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def _model_file(folder: Path) -> Path:
    return folder / "open_clip_model.safetensors"
