"""The tensor names of the original's ``.ckpt`` files (Stable Diffusion 1.x in CompVis' code), both ways.

A name of diffusers or transformers determines its original name and is never determined by it, so one direction is
written down here and reading looks names up in it: what one writes the other reads. The files themselves are
safetensors; an original ``.ckpt`` is a pickle and is read by torch's ``weights_only`` loader, which runs no code.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ip2p.errors import CheckpointError, StorageError
from ip2p.models.checkpoint import FETCH_AGAIN, PICKLED, check_finite, check_safetensors, file_sha256
from ip2p.models.components import EditModel, TextToImage
from ip2p.models.export import with_unscaled_image

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
EMA = "model_ema."

_UNET_FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_original(model: EditModel | TextToImage, path: Path) -> None:
    """Write ``model`` under the original's names as one safetensors file, which appears whole or not at all.

    Raises StorageError where it cannot be written.
    """
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(original_state(model), partial, metadata={"format": "pt"})
        os.replace(partial, path)  # noqa: PTH105
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); free space or name another"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def original_state(model: EditModel | TextToImage) -> dict[str, torch.Tensor]:
    """The model's tensors under the original's names, on the CPU; the image latent goes in unscaled, as there."""
    if isinstance(model, EditModel):
        model = with_unscaled_image(model)
    names, own = original_names(model), _own_state(model)
    return {names[name]: _as_original(names[name], tensor).cpu().contiguous() for name, tensor in own.items()}


def load_original(path: Path, base: TextToImage | EditModel) -> EditModel:
    """The edit model in an original-layout file: safetensors, or a torch ``.ckpt`` of tensors.

    ``base`` gives what such a file lacks: the architecture, the tokenizer and the noise schedule; its weights are not
    used. EMA weights are taken where the file has them, as the original's editing does. float32, frozen, on the CPU.
    Raises CheckpointError where the file cannot be used.
    """
    from diffusers import UNet2DConditionModel

    tensors = read_original(path)
    config = {**base.unet.config, "in_channels": _image_channels(tensors, path, base)}
    parts = {
        "unet": UNet2DConditionModel.from_config(config),
        "vae": type(base.vae).from_config(base.vae.config),
        "text_encoder": type(base.text_encoder)(base.text_encoder.config),
    }
    model = EditModel(
        **parts, tokenizer=base.tokenizer, scheduler_config=base.scheduler_config, sha256={}, image_latent_scaled=False
    )
    state = _taken(tensors, original_names(model), _own_state(model), path)
    for name, module in parts.items():
        mine = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        module.load_state_dict(mine)
        check_finite(module.eval().requires_grad_(False), path)
    return dataclasses.replace(model, sha256=dict.fromkeys(parts, file_sha256(path)))


def read_original(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an original-layout file, by their names there. Raises CheckpointError where it cannot be read."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_safetensors(path)
        return load_file(path)
    if path.suffix not in PICKLED:
        raise CheckpointError(f"{path}: expected a name that ends in .safetensors, {', '.join(PICKLED)}")
    found = _unpickled(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: found a {type(found).__name__}, expected a table of tensors; {FETCH_AGAIN}")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def original_names(model: EditModel | TextToImage) -> dict[str, str]:
    """``unet.`` | ``vae.`` | ``text_encoder.`` + the tensor's name, to its name in an original file."""
    unet, vae = model.unet, model.vae
    return {
        **{f"unet.{name}": UNET + name_of for name, name_of in unet_names(unet.state_dict()).items()},
        **{f"vae.{name}": VAE + name_of for name, name_of in vae_names(vae.state_dict()).items()},
        **{f"text_encoder.{name}": TEXT + _inner(name) for name in model.text_encoder.state_dict()},
    }


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Of a UNet's tensors, diffusers' names to the original's, in which blocks are numbered through."""
    listed = list(names)
    layers = {name.split(".")[3] for name in listed if name.startswith("down_blocks.0.resnets.")}
    attended = {name.split(".")[1] for name in listed if re.match(r"up_blocks\.\d+\.attentions", name)}
    return {name: _unet_name(name, len(layers), attended) for name in listed}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Of an autoencoder's tensors, diffusers' names to the original's, which count the decoder's blocks backwards."""
    listed = list(names)
    blocks = {name.split(".")[2] for name in listed if name.startswith("decoder.up_blocks.")}
    return {name: _vae_name(name, len(blocks) - 1) for name in listed}


def _unet_name(name: str, per_block: int, attended: set[str]) -> str:
    for place, original in _UNET_FIXED.items():
        if name.startswith(place + "."):
            return original + _unet_inner(name.removeprefix(place))
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\..*)", name)
    if found is None:
        raise CheckpointError(
            f"{name}: found a tensor that Stable Diffusion 1.x has not; the original's layout is for its UNets only"
        )
    side, block, kind, place, rest = found.groups()
    number = int(block) * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{number + per_block + 1}.0.op" + rest.removeprefix(".conv")
    if kind == "upsamplers":  # the last part of the block's last layer, which an attention may stand before
        return f"output_blocks.{number + per_block}.{2 if block in attended else 1}{rest}"
    first, blocks = (1, "input_blocks") if side == "down" else (0, "output_blocks")
    return f"{blocks}.{number + first + int(place)}.{0 if kind == 'resnets' else 1}{_unet_inner(rest)}"


def _unet_inner(rest: str) -> str:
    """What follows the name of a block; only its residual blocks are called otherwise."""
    first, _, last = rest[1:].partition(".")
    return f".{_UNET_RESNET[first]}.{last}" if first in _UNET_RESNET else rest


def _vae_name(name: str, last: int) -> str:
    name = re.sub(r"\bconv_norm_out\b", "norm_out", name).replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{last - int(found[1])}.", name)
    name = name.replace(".down_blocks.", ".down.").replace(".resnets.", ".block.")
    name = name.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
    if ".mid_block.attentions.0." in name:
        start, _, inner = name.partition("mid_block.attentions.0.")
        part, _, kind = inner.rpartition(".")
        name = f"{start}mid.attn_1.{_VAE_ATTENTION[part]}.{kind}"
    return name


def _inner(name: str) -> str:
    """transformers has put its text model both inside a ``text_model`` and not, in turn."""
    return name.removeprefix("text_model.")


def _own_state(model: EditModel | TextToImage) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _as_original(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The autoencoder's attention is made of 1 x 1 convolutions there and of linear layers here."""
    is_linear = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) and tensor.dim() == 2
    return tensor[:, :, None, None] if is_linear else tensor


def _taken(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], own: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """The file's tensors under our names, float32, in our shapes; raises CheckpointError for the first that is not."""
    averaged = any(name.startswith(EMA + "diffusion_model") for name in tensors)
    state = {}
    for name, original in names.items():
        key = _ema_name(original) if averaged and original.startswith(UNET) else original
        if key not in tensors:
            raise CheckpointError(f"{path}: {key} is missing, expected for {name}; name the base of this file")
        found, expected = (tuple(side for side in one.shape if side > 1) for one in (tensors[key], own[name]))
        if found != expected:
            raise CheckpointError(f"{path}: {key} has shape {found}, expected {expected}; name the base of this file")
        state[name] = tensors[key].reshape(own[name].shape).to(own[name].dtype)
    return state


def _ema_name(original: str) -> str:
    """The original keeps its moving averages as buffers, whose names may hold no dots."""
    return EMA + original.removeprefix("model.").replace(".", "")


def _image_channels(tensors: Mapping[str, torch.Tensor], path: Path, base: TextToImage | EditModel) -> int:
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    if first is None:
        raise CheckpointError(f"{path}: holds no {UNET}input_blocks.0.0.weight; expected the original's layout")
    found, latent = int(first.shape[1]), int(base.vae.config.latent_channels)
    if found != 2 * latent:
        hint = "; this is a text-to-image model, train first" if found == latent else "; use another file"
        raise CheckpointError(f"{path}: found a UNet of {found} input channels, expected {2 * latent}{hint}")
    return found


def _unpickled(path: Path) -> typing.Any:
    """Tensors and plain containers only. Lightning's files also name a class of its own, which stays a mere name."""
    callback = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    try:
        with torch.serialization.safe_globals([(_Named, callback)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's reader raises many kinds, and one advises to run the file's code
        raise CheckpointError(f"{path}: cannot be read as tensors only: {_found_in(path, error)}") from error


def _found_in(path: Path, error: Exception) -> str:
    """What the file is, as far as its first bytes and torch's error say, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not size:
        return f"found an empty file; {FETCH_AGAIN}"
    if start.lstrip()[:1] in (b"<", b"{") or b"html" in start.lower():
        return f"found text that begins with {start[:24].decode(errors='replace')!r}; {FETCH_AGAIN}"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"found {size} bytes of a file that was cut short; {FETCH_AGAIN}"
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"found {named[1]}, which could run code; take a file of tensors from a source that you trust"
    return f"found {size} bytes that are no torch file, or a damaged one; {FETCH_AGAIN}"


class _Named:
    """Stands for a class that a file names and that must not be imported."""
