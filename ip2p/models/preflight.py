"""Looks at every weight file a recipe names before any worker starts, so that one clear error comes first.

Files are checked to be there, whole and (the embedded family) unaltered, and are hashed; nothing is loaded.
"""

from __future__ import annotations

from pathlib import Path

from ip2p.config import Recipe
from ip2p.errors import CheckpointError
from ip2p.models.checkpoint import check_safetensors, find_weights, weights_sha256
from ip2p.models.components import (
    check_base_width,
    check_edit_width,
    check_resolution,
    find_clip,
    model_folder,
    own_scales,
    read_scheduler_config,
)

COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def check_model_files(recipe: Recipe) -> dict[str, str]:
    """The id of each component's weights (sha256; for an open_clip tag its name).

    Raises RecipeError where a model is not named, CheckpointError where its files cannot be used.
    """
    models = recipe.models
    ids = _component_ids(model_folder("text_to_image", models.text_to_image))
    if recipe.triplets.writer == "lm":
        ids["triplet_lm"] = _folder_id(model_folder("triplet_lm", models.triplet_lm))
    *_, ids["clip"] = find_clip(models)
    return ids


def check_base(base: str, resolution: int) -> dict[str, str]:
    """The same of the model, a folder or ``embedded``, that a training on pictures of ``resolution`` begins with."""
    folder = model_folder("text_to_image", base, setting="base")
    check_base_width(folder)
    check_resolution(folder, resolution)
    return _component_ids(folder)


def check_edit_model(name: str, setting: str = "--ckpt") -> dict[str, str]:
    """The same of an edit model, a folder or ``embedded``, and its own guidance scales, since they decide edits too."""
    folder = model_folder("edit_model", name, setting=setting)
    check_edit_width(folder)
    return {**_component_ids(folder), "scales": " ".join(f"{scale:g}" for scale in own_scales(folder))}


def check_measured(model: str, recipe: Recipe, by_clip: bool, beside_sdedit: bool) -> dict[str, str]:
    """The same of all that an evaluation of the edit model ``model`` asks: CLIP, and SDEdit's text-to-image model."""
    ids = {f"edit_model_{part}": id_ for part, id_ in check_edit_model(model, setting="--model").items()}
    if by_clip:
        *_, ids["clip"] = find_clip(recipe.models)
    if beside_sdedit:
        ids |= _component_ids(model_folder("text_to_image", recipe.models.text_to_image))
    return ids


def check_edit_files(name: str) -> None:
    """That an edit model's files are there and as long as they should be; nothing is hashed. Raises likewise."""
    folder = model_folder("edit_model", name, setting="--ckpt")
    check_edit_width(folder)
    for part, stem in COMPONENTS.items():
        find_weights(folder / part, stem)


def _component_ids(folder: Path) -> dict[str, str]:
    ids = {part: weights_sha256(find_weights(folder / part, stem).files) for part, stem in COMPONENTS.items()}
    read_scheduler_config(folder / "scheduler" / "scheduler_config.json")
    return ids


def _folder_id(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file here; name a folder with whole weights")
    for path in files:
        check_safetensors(path)
    return weights_sha256(files)
