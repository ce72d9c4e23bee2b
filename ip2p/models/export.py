"""An edit model as a folder that ``StableDiffusionInstructPix2PixPipeline.from_pretrained`` loads as it is.

The folder also loads by ``ip2p.models.components.load_edit_model``: its manifest names every byte, and
``edit_model.json`` says how the image latent goes in. diffusers knows one way, unscaled; a model that was trained the
other way is written with the scale in the weights that meet it. The original's own layout is
``ip2p.models.original_layout``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Mapping
from pathlib import Path

from ip2p.errors import InputError, StorageError
from ip2p.models.checkpoint import write_manifest
from ip2p.models.components import EDIT_MODEL_FILE, EDIT_SETTINGS, EditModel

SCHEDULER = "EulerAncestralDiscreteScheduler"
SCHEDULE = (
    "beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "trained_betas",
    "rescale_betas_zero_snr",
)  # fmt: skip
"""What a scheduler's config says of the training; the rest is how its sampler walks, which is written as ours."""


def save_edit_model(
    model: EditModel, folder: Path, about: Mapping[str, object] | None = None, dtype: str | None = None
) -> None:
    """Write ``model`` to ``folder``, which must not exist yet; it appears whole or not at all.

    ``about`` (how it was made) goes into the manifest. ``dtype`` (float16, …) is that of the written weights; None
    writes each component in its own. Raises InputError where ``folder`` exists, StorageError where it cannot be
    written.
    """
    if folder.exists():
        raise InputError(f"{folder}: already exists; name a new folder or remove this one")
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=folder.parent))
        _write_parts(with_unscaled_image(model), partial, dtype)
        write_manifest(partial, about)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, folder)  # noqa: PTH105
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror or error}); free space or name another"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def with_unscaled_image(model: EditModel) -> EditModel:
    """The same function of an unscaled image latent: what scaled it moves into the weights that it meets first."""
    if not model.image_latent_scaled:
        return model
    unet = copy.deepcopy(model.unet)
    unet.conv_in.weight.data[:, model.vae.config.latent_channels :] *= model.vae.config.scaling_factor
    return dataclasses.replace(model, unet=unet, image_latent_scaled=False)


def model_index() -> dict[str, typing.Any]:
    """diffusers' own table of contents: which class, of which library, reads each part."""
    return {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", SCHEDULER],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def euler_ancestral_config(scheduler_config: Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    """The sampler that the original edits with, on the noise schedule of ``scheduler_config``."""
    schedule = {name: scheduler_config[name] for name in SCHEDULE if name in scheduler_config}
    return {"_class_name": SCHEDULER, **schedule, "timestep_spacing": "linspace", "steps_offset": 0}


def _write_parts(model: EditModel, folder: Path, dtype: str | None) -> None:
    for name in ("unet", "vae", "text_encoder"):
        _in_dtype(getattr(model, name), dtype).save_pretrained(folder / name, safe_serialization=True)
        _forget_origin(folder / name / "config.json")
    model.tokenizer.save_pretrained(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", euler_ancestral_config(model.scheduler_config))
    _write_json(folder / EDIT_MODEL_FILE, {name: getattr(model, name) for name in EDIT_SETTINGS})
    _write_json(folder / "model_index.json", model_index())


def _in_dtype(module: typing.Any, dtype: str | None) -> typing.Any:
    import torch

    return module if dtype is None else copy.deepcopy(module).to(getattr(torch, dtype))


def _forget_origin(path: Path) -> None:
    """Drop the folder that a part was read from: it means nothing elsewhere, and the same part has the same bytes."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    _write_json(path, config)


def _write_json(path: Path, content: Mapping[str, typing.Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
