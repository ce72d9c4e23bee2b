"""Looks at every weight file a recipe names before any worker starts, so that one clear error comes first.

Files are checked to be there, whole and (the embedded family) unaltered; nothing is loaded into memory.
"""

from __future__ import annotations

from pathlib import Path

from ip2p.config import EMBEDDED, Recipe
from ip2p.models.checkpoint import check_safetensors, find_weights
from ip2p.models.components import embedded_folder, read_scheduler_config
from ip2p.triplets.language_model import model_folder

COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def check_model_files(recipe: Recipe) -> None:
    """Raise RecipeError where a model is not named, CheckpointError where its files cannot be used."""
    models = recipe.models
    folder = model_folder(models.text_to_image, "text_to_image")
    for component, stem in COMPONENTS.items():
        find_weights(folder / component, stem)
    read_scheduler_config(folder / "scheduler" / "scheduler_config.json")
    if recipe.triplets.writer == "lm":
        for path in sorted(model_folder(models.triplet_lm, "triplet_lm").glob("*.safetensors")):
            check_safetensors(path)
    if models.clip == EMBEDDED:
        embedded_folder("clip")
    elif Path(models.clip).is_dir():
        for path in sorted(Path(models.clip).glob("*.safetensors")):
            check_safetensors(path)
