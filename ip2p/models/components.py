"""From a model id in a Recipe to loaded modules, at any size, by the classes of diffusers, transformers and open_clip.

Whatever cannot be used is refused here with file, finding, expectation and remedy. Nothing is fetched for a folder,
and nothing is trained or changed: widening a text-to-image UNet is the business of ``ip2p.models.widening``, and
writing an edit model that of ``ip2p.models.export``.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ip2p.config import EMBEDDED, Models
from ip2p.errors import CheckpointError, InputError, RecipeError
from ip2p.models.checkpoint import (
    FETCH_AGAIN,
    MANIFEST,
    REBUILD,
    Weights,
    check_finite,
    find_weights,
    refuse_pickles,
    verify_manifest,
    weights_sha256,
)

if typing.TYPE_CHECKING:
    import torch

EMBEDDED_WEIGHTS = Path(__file__).resolve().parents[1] / "postcards" / "weights"
PREDICTION_TYPES = ("epsilon", "v_prediction")
EDIT_MODEL_FILE = "edit_model.json"
EDIT_SETTINGS = ("image_latent_scaled", "guidance_scale", "image_guidance_scale")
"""Beside ``model_index.json``: what an edit model's folder says that no file of diffusers has a place for."""


@dataclass(frozen=True)
class TextToImage:
    """A Stable-Diffusion-class model, frozen and in eval mode. ``sha256``: component name to the id of its weights."""

    unet: typing.Any  # UNet2DConditionModel, in models.dtype
    vae: typing.Any  # AutoencoderKL, float32
    text_encoder: typing.Any  # CLIPTextModel, float32
    tokenizer: typing.Any  # CLIPTokenizer
    scheduler_config: dict[str, typing.Any]
    sha256: dict[str, str]


@dataclass(frozen=True)
class EditModel:
    """A text-to-image model whose UNet also sees the original image, frozen and in eval mode.

    ``image_latent_scaled`` is how it was trained to see it: False (the original's, and Stable Diffusion 1.5's way) as
    the mode of the VAE's posterior as it is, True as that mode times the VAE's scaling factor. The two guidance scales
    are those that an edit gets when nobody asks for others; the original's, unless the model's maker measured better.
    """

    unet: typing.Any  # UNet2DConditionModel in the wanted dtype; in_channels = noisy latent, then image latent
    vae: typing.Any  # AutoencoderKL, float32
    text_encoder: typing.Any  # CLIPTextModel, float32
    tokenizer: typing.Any  # CLIPTokenizer
    scheduler_config: dict[str, typing.Any]
    sha256: dict[str, str]
    image_latent_scaled: bool = False
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5

    def scales(self, guidance_scale: typing.Any, image_guidance_scale: typing.Any) -> tuple[typing.Any, typing.Any]:
        """What was asked for, with the model's own scale in place of None."""
        return (
            self.guidance_scale if guidance_scale is None else guidance_scale,
            self.image_guidance_scale if image_guidance_scale is None else image_guidance_scale,
        )


@dataclass(frozen=True)
class Clip:
    """An open_clip model, frozen, float32. ``tokenizer``: texts to ids ``(n, window)``; mean and std are per RGB."""

    model: typing.Any
    tokenizer: Callable[[list[str]], torch.Tensor]
    image_size: int  # pixels, square
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str


def resolve_device(device: str = "auto") -> torch.device:
    """``auto`` is the GPU where there is one, else the CPU; anything else is taken literally.

    Raises InputError for a device that this machine or this build of torch does not have.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}); known are auto, cpu, cuda, cuda:1, …"
        ) from error
    return torch.device(device)


def embedded_folder(name: str) -> Path:
    """The verified folder of a part of the shipped family: text_to_image, edit_model, clip, triplet_lm or reader.

    Raises CheckpointError where a file is absent or altered.
    """
    folder = EMBEDDED_WEIGHTS / name
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, expected the embedded weights; {REBUILD}")
    verify_manifest(folder)
    return folder


def load_text_to_image(models: Models, device: str | torch.device = "auto") -> TextToImage:
    """Load ``models.text_to_image``: a diffusers folder with unet, vae, text_encoder, tokenizer and scheduler.

    Raises RecipeError where no folder is named, CheckpointError where it cannot be used.
    """
    folder = model_folder("text_to_image", models.text_to_image)
    return TextToImage(**_load_parts(folder, models.dtype, device, (1,)))


def load_edit_model(
    folder: str | Path = EMBEDDED, dtype: str = "float32", device: str | torch.device = "auto"
) -> EditModel:
    """Load ``embedded`` or a diffusers folder whose UNet takes the original image's latent beside the noisy one.

    ``dtype`` (float32, bfloat16, float16) is the UNet's. Raises RecipeError where no folder is named, CheckpointError
    where it cannot be used; a text-to-image model is refused with the way to train one.
    """
    found = model_folder("edit_model", str(folder))
    return EditModel(**_load_parts(found, dtype, device, (2,)), **_edit_settings(found / EDIT_MODEL_FILE))


def own_scales(folder: Path) -> tuple[float, float]:
    """guidance_scale and image_guidance_scale of the edit model in ``folder``, without loading it."""
    found = _edit_settings(folder / EDIT_MODEL_FILE)
    text, image = (found.get(name, getattr(EditModel, name)) for name in ("guidance_scale", "image_guidance_scale"))
    return text, image


def load_base(folder: str | Path = EMBEDDED, device: str | torch.device = "auto") -> EditModel:
    """Load what training begins with, in float32: a text-to-image model, or an edit model to be trained further.

    The UNet keeps its width (``ip2p.models.widening`` makes it wider). Raises like ``load_edit_model``.
    """
    found = model_folder("text_to_image", str(folder), setting="base")
    return EditModel(**_load_parts(found, "float32", device, (1, 2)), **_edit_settings(found / EDIT_MODEL_FILE))


def load_clip(models: Models, device: str | torch.device = "auto") -> Clip:
    """Load ``models.clip``: ``embedded``, a folder with open_clip_config.json, or an open_clip model name.

    A name needs ``models.clip_pretrained``, a tag of open_clip (fetched by it once) or a safetensors file.
    Raises RecipeError where that is not so, CheckpointError where weights cannot be used.
    """
    import open_clip

    at = resolve_device(device) if isinstance(device, str) else device
    name, pretrained, where, sha256 = find_clip(models)
    with _refusals(where):
        model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    check_finite(model, where)
    return _as_clip(model.to(at).eval().requires_grad_(False), tokenizer, sha256)


def find_clip(models: Models) -> tuple[str, str | None, Path, str]:
    """Check the files of ``models.clip`` without loading them; raises like ``load_clip``.

    Returns name and pretrained as open_clip spells them, the place that messages name, and the id of the weights.
    """
    if models.clip and models.clip != EMBEDDED and not Path(models.clip).expanduser().is_dir():
        return _named_clip(models)
    folder = model_folder("clip", models.clip)
    return f"local-dir:{folder}", None, folder, weights_sha256(_clip_weights(folder).files)


def read_scheduler_config(path: Path) -> dict[str, typing.Any]:
    """The scheduler's JSON; raises CheckpointError for a prediction type that the samplers do not know."""
    config = _read_json(path)
    found = config.get("prediction_type", "epsilon")
    if found not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{path}: found prediction_type {found!r}, expected {' or '.join(PREDICTION_TYPES)}; use another model"
        )
    return config


def model_folder(field: str, name: str, setting: str = "") -> Path:
    """The folder of a model that a recipe or flag names: its own path, or that of the embedded ``field``.

    ``setting`` is the word for it in messages (default ``models.field``). Raises RecipeError where none is named,
    CheckpointError where there is no such folder or its manifest says otherwise.
    """
    if name == EMBEDDED:
        return embedded_folder(field)
    setting = setting or ("--ckpt" if field == "edit_model" else f"models.{field}")
    option = f"{setting} DIR" if setting.startswith("--") else f"--set {setting}=DIR"
    if not name:
        raise RecipeError(f"{setting} is empty; name a folder with its weights: `{option}`")
    folder = Path(name).expanduser()
    if folder.is_file():
        raise CheckpointError(f"{folder}: found a file, expected a folder in the layout of diffusers; `{option}`")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; correct {setting} (`{option}`)")
    if (folder / MANIFEST).is_file():
        verify_manifest(folder, remedy=FETCH_AGAIN)
    return folder


def _load_parts(
    folder: Path, dtype: str, device: str | torch.device, latents_in: tuple[int, ...]
) -> dict[str, typing.Any]:
    """The fields of TextToImage; ``latents_in``: how many latents the UNet may take (the noisy one, the image's)."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    at = resolve_device(device) if isinstance(device, str) else device
    stem = "diffusion_pytorch_model"
    unet, unet_id = _load_module(UNet2DConditionModel, folder / "unet", stem, torch_dtype=getattr(torch, dtype))
    vae, vae_id = _load_module(AutoencoderKL, folder / "vae", stem, torch_dtype=torch.float32)
    text_encoder, text_id = _load_module(CLIPTextModel, folder / "text_encoder", "model", dtype=torch.float32)
    with _refusals(folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    _check_widths(folder / "unet", unet, vae, text_encoder, latents_in)
    _check_vocabulary(folder / "tokenizer", len(tokenizer), text_encoder.config.vocab_size)
    return {
        "unet": unet.to(at),
        "vae": vae.to(at),
        "text_encoder": text_encoder.to(at),
        "tokenizer": tokenizer,
        "scheduler_config": read_scheduler_config(folder / "scheduler" / "scheduler_config.json"),
        "sha256": {"unet": unet_id, "vae": vae_id, "text_encoder": text_id},
    }


def _edit_settings(path: Path) -> dict[str, typing.Any]:
    """What ``edit_model.json`` says; nothing where there is no such file: other makers follow the original."""
    found = _read_json(path) if path.is_file() else {}
    settings = {name: found[name] for name in EDIT_SETTINGS if name in found}
    if not isinstance(settings.get("image_latent_scaled", False), bool):
        wrong = settings["image_latent_scaled"]
        raise CheckpointError(f"{path}: found image_latent_scaled {wrong!r}, expected true or false; correct the file")
    for name, value in settings.items():
        if name != "image_latent_scaled" and (not isinstance(value, int | float) or value < 0):
            raise CheckpointError(f"{path}: found {name} {value!r}, expected a number from 0 on; correct the file")
    return settings


def _load_module(kind: typing.Any, folder: Path, stem: str, **dtype: torch.dtype) -> tuple[typing.Any, str]:
    """A frozen module in eval mode on the CPU, and the id of its weights. ``dtype``: as its library spells the word."""
    _read_json(folder / "config.json")
    weights = find_weights(folder, stem)
    with _refusals(weights.files[0]):
        model, report = kind.from_pretrained(
            folder,
            variant=weights.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **dtype,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{weights.files[0]}: {len(missing)} tensors of config.json are missing, the first {missing[0]}; "
            f"weights and config.json belong to different models: {FETCH_AGAIN}"
        )
    model = model.eval().requires_grad_(False)
    check_finite(model, weights.files[0])
    return model, weights_sha256(weights.files)


def check_base_width(folder: Path) -> None:
    """Raise CheckpointError where the UNet of ``folder`` can be no base; reads configs alone."""
    _check_configs(folder, (1, 2))


def check_resolution(folder: Path, resolution: int) -> None:
    """Raise CheckpointError where the autoencoder of ``folder`` does not take squares of ``resolution`` pixels."""
    side = 2 ** (len(_read_json(folder / "vae" / "config.json").get("block_out_channels", (0,) * 4)) - 1)
    if resolution % side:
        raise CheckpointError(f"{folder}/vae: takes sides of multiples of {side} pixels, not resolution={resolution}")


def check_edit_width(folder: Path) -> None:
    """The same where it is no edit model."""
    _check_configs(folder, (2,))


def _check_configs(folder: Path, latents_in: tuple[int, ...]) -> None:
    unet, vae = (_read_json(folder / part / "config.json") for part in ("unet", "vae"))
    _check_in_channels(folder / "unet", unet.get("in_channels", 4), vae.get("latent_channels", 4), latents_in)


def _check_in_channels(where: Path, found: int, latent: int, latents_in: tuple[int, ...]) -> None:
    expected = " or ".join(str(count * latent) for count in latents_in)
    if found not in [count * latent for count in latents_in]:
        hints = {
            2 * latent: " (this is an edit model; painting pairs needs the text-to-image model that it came from)",
            latent: " (this is a text-to-image model; train first: `python jobs/train.py --help`)",
        }
        hint = hints.get(found, "; use a UNet made for this VAE")
        raise CheckpointError(f"{where}: found in_channels {found}, expected {expected}{hint}")


def _check_widths(
    where: Path, unet: typing.Any, vae: typing.Any, text_encoder: typing.Any, latents_in: tuple[int, ...]
) -> None:
    _check_in_channels(where, unet.config.in_channels, vae.config.latent_channels, latents_in)
    text = text_encoder.config.hidden_size
    if unet.config.cross_attention_dim != text:
        raise CheckpointError(
            f"{where}: found cross_attention_dim {unet.config.cross_attention_dim}, expected {text} (the width of "
            "text_encoder); use the text encoder that this UNet was trained with"
        )


def _check_vocabulary(where: Path, words: int, known: int) -> None:
    if words > known:
        raise CheckpointError(
            f"{where}: found {words} words, expected at most {known} (those of text_encoder); "
            "use the tokenizer that this text encoder was trained with"
        )


def _named_clip(models: Models) -> tuple[str, str, Path, str]:
    import open_clip

    if "/" in models.clip or models.clip not in open_clip.list_models():
        raise RecipeError(
            f"models.clip {models.clip!r} is neither a folder nor an open_clip model name; "
            "set `--set models.clip=DIR`, or a name from open_clip.list_models()"
        )
    tag = models.clip_pretrained
    file = Path(tag).expanduser()
    if tag and file.suffix == ".safetensors":
        check_whole = find_weights(file.parent, file.name.removesuffix(".safetensors"))
        return models.clip, str(file), file, weights_sha256(check_whole.files)
    if tag in open_clip.list_pretrained_tags_by_model(models.clip):
        return models.clip, tag, Path(models.clip), f"open_clip:{models.clip}:{tag}"
    known = ", ".join(open_clip.list_pretrained_tags_by_model(models.clip)) or "none"
    raise RecipeError(
        f"models.clip_pretrained {tag!r} is neither a .safetensors file nor a tag of {models.clip} (known: {known}); "
        "`--set models.clip_pretrained=FILE_OR_TAG`"
    )


def _clip_weights(folder: Path) -> Weights:
    _read_json(folder / "open_clip_config.json")
    names = ("open_clip_model", "open_clip_pytorch_model", "model")  # the order in which open_clip looks
    for name in names:
        if (folder / f"{name}.safetensors").is_file():
            return find_weights(folder, name)
    refuse_pickles(folder)
    raise CheckpointError(f"{folder / names[0]}.safetensors: no such file; name a folder with whole weights")


def _as_clip(model: typing.Any, tokenizer: typing.Any, sha256: str) -> Clip:
    import open_clip.model

    preprocess = open_clip.model.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    side = size if isinstance(size, int) else size[0]
    return Clip(model, tokenizer, side, tuple(preprocess["mean"]), tuple(preprocess["std"]), sha256)


def _read_json(path: Path) -> dict[str, typing.Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; name a folder in the layout of diffusers or open_clip") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); {FETCH_AGAIN}") from error


@contextmanager
def _refusals(where: Path) -> Iterator[None]:
    """Readers of weights fail in many ways; each becomes a CheckpointError with the file's name."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{where}: cannot be loaded ({reason}); {FETCH_AGAIN} or use another model") from error
