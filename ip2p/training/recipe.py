"""TrainingRecipe: all that decides which edit model comes out of a set of pairs (section 3.2 and appendix A).

How many workers, which devices and whether latents are cached decide only how fast; they are not here. Pairs and
weights are named by their hashes in the checkpoint, so a resumed run is refused where these differ.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass

from ip2p.config import EMBEDDED, overridden
from ip2p.errors import RecipeError

PRECISIONS = ("float32", "bfloat16")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainingRecipe:
    """Defaults are the released code's, at its batch of 1024, unless a comment says otherwise."""

    name: str
    seed: int = 0
    base: str = EMBEDDED  # diffusers folder of a text-to-image model, or of an edit model to train further
    steps: int = 10_000  # optimizer steps
    global_batch: int = 1024  # samples an optimizer step, over all workers and micro-batches
    micro_batch: int = 32  # samples in one UNet call of one worker; other values move last bits only
    learning_rate: float = 1e-4
    schedule: str = "constant"  # constant | cosine (falls to 0 at the last step); the original is constant
    warmup: int = 0  # steps over which the learning rate rises
    optimizer: str = "adamw"  # adamw, as in the original | muon, for an edit model trained further
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # 0 = no clipping, as in the original; diffusers clips at 1
    ema_decay: float = 0.9999  # of an optimizer step; the original updates once a micro-batch
    dropout_rate: float = 0.05  # chance of each of: no text, no image, neither
    flip: float = 0.5  # chance that both pictures of a pair are mirrored
    resolution: int = 256  # pixels, square
    precision: str = "bfloat16"  # of the UNet's arithmetic; weights, EMA and optimizer are float32 (the original: all)
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 3
    guidance_scale: float = 7.5  # s_T and s_I that the exported model edits with when nobody asks for others;
    image_guidance_scale: float = 1.5  # nothing of the training depends on them
    lora_rank: int = 0  # 0 = all weights are trained; else only low-rank additions (peft) and conv_in

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


def postcard() -> TrainingRecipe:
    """The embedded family on 64-pixel postcards, on CPU cores."""
    return TrainingRecipe(
        name="postcard", steps=6000, global_batch=64, micro_batch=64, learning_rate=6e-4, schedule="cosine", warmup=200,
        guidance_scale=3.0, image_guidance_scale=2.0,
        ema_decay=0.999, resolution=64, precision="float32", checkpoint_every=200, keep_checkpoints=2,
    )  # fmt: skip


def sd15() -> TrainingRecipe:
    """Stable-Diffusion-1.5-class weights at 256 pixels. Set ``base=DIR``."""
    return TrainingRecipe(name="sd15", base="")


TRAINING_RECIPES = {"postcard": postcard, "sd15": sd15}


def load_training_recipe(name: str, overrides: typing.Sequence[str] = ()) -> TrainingRecipe:
    """The recipe ``name`` with ``field=value`` overrides applied in order.

    Raises RecipeError for an unknown recipe, an unknown field (the message lists the known ones) or a bad value.
    """
    if name not in TRAINING_RECIPES:
        raise RecipeError(f"unknown training recipe {name!r}; known: {', '.join(sorted(TRAINING_RECIPES))}")
    recipe = overridden(TRAINING_RECIPES[name](), overrides)
    check_training_recipe(recipe)
    return recipe


def training_recipe_from_json(text: str) -> TrainingRecipe:
    """Read back what ``TrainingRecipe.to_json`` wrote; raises RecipeError on a field this version does not know."""
    try:
        return TrainingRecipe(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the training recipe was written by another version: {error}") from error


def check_training_recipe(recipe: TrainingRecipe) -> None:
    """Raise RecipeError where a value cannot work, before anything is loaded."""
    rules = (
        (recipe.steps >= 1, "steps must be at least 1"),
        (recipe.global_batch >= 1, "global_batch must be at least 1"),
        (recipe.micro_batch >= 1, "micro_batch must be at least 1"),
        (recipe.learning_rate > 0, "learning_rate must be above 0"),
        (recipe.schedule in SCHEDULES, f"schedule is {' or '.join(SCHEDULES)}"),
        (recipe.warmup >= 0, "warmup must be at least 0 steps"),
        (recipe.optimizer in OPTIMIZERS, f"optimizer is {' or '.join(OPTIMIZERS)}"),
        (recipe.weight_decay >= 0, "weight_decay must be at least 0"),
        (recipe.max_grad_norm >= 0, "max_grad_norm must be at least 0 (0 = no clipping)"),
        (0 <= recipe.ema_decay < 1, "ema_decay lies in 0..1, 1 excluded"),
        (0 <= recipe.dropout_rate <= 1 / 3, "dropout_rate lies in 0..1/3 (three ranges of that width must fit in 1)"),
        (0 <= recipe.flip <= 1, "flip is a chance, 0..1"),
        (recipe.resolution > 0 and recipe.resolution % 8 == 0, "resolution is a multiple of 8 pixels"),
        (recipe.precision in PRECISIONS, f"precision is {' or '.join(PRECISIONS)}"),
        (recipe.checkpoint_every >= 1, "checkpoint_every must be at least 1 step"),
        (recipe.keep_checkpoints >= 1, "keep_checkpoints must be at least 1"),
        (recipe.guidance_scale >= 0, "guidance_scale must be at least 0"),
        (recipe.image_guidance_scale >= 0, "image_guidance_scale must be at least 0"),
        (recipe.lora_rank >= 0, "lora_rank must be at least 0 (0 = train all weights)"),
    )
    for holds, message in rules:
        if not holds:
            raise RecipeError(message)
