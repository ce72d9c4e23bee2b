from __future__ import annotations

import dataclasses

import pytest

from ip2p.config import known_fields
from ip2p.errors import RecipeError
from ip2p.training.learning_rate import learning_rate_at
from ip2p.training.recipe import TRAINING_RECIPES, load_training_recipe, sd15, training_recipe_from_json


def test_overrides_take_the_type_of_the_field_and_survive_json() -> None:
    recipe = load_training_recipe("sd15", ["steps=12", "learning_rate=5e-5", "schedule=cosine", "base=weights/sd"])
    assert (recipe.steps, recipe.learning_rate, recipe.schedule, recipe.base) == (12, 5e-5, "cosine", "weights/sd")
    assert training_recipe_from_json(recipe.to_json()) == recipe


def test_sd15_has_the_released_values() -> None:
    recipe = sd15()
    assert (recipe.global_batch, recipe.learning_rate, recipe.schedule, recipe.warmup) == (1024, 1e-4, "constant", 0)
    assert (recipe.ema_decay, recipe.dropout_rate, recipe.flip, recipe.resolution) == (0.9999, 0.05, 0.5, 256)
    assert recipe.weight_decay == 0.01


@pytest.mark.parametrize("name", sorted(TRAINING_RECIPES))
def test_every_recipe_passes_its_own_checks_and_every_field_can_be_set(name: str) -> None:
    recipe = load_training_recipe(name)
    for field in known_fields(recipe):
        if field != "name":
            assert load_training_recipe(name, [f"{field}={getattr(recipe, field)}"]) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=1", "unknown recipe field 'lr'; known: seed, base, steps"),
        ("steps=many", "steps wants int"),
        ("steps=0", "steps must"),
        ("global_batch=0", "global_batch must"),
        ("micro_batch=0", "micro_batch must"),
        ("learning_rate=0", "learning_rate must"),
        ("schedule=linear", "constant or cosine"),
        ("warmup=-1", "warmup must"),
        ("weight_decay=-1", "weight_decay must"),
        ("max_grad_norm=-1", "max_grad_norm must"),
        ("ema_decay=1", "1 excluded"),
        ("dropout_rate=0.34", "0..1/3"),
        ("flip=1.5", "flip is a chance"),
        ("resolution=60", "multiple of 8"),
        ("precision=float16", "float32 or bfloat16"),
        ("checkpoint_every=0", "checkpoint_every must"),
        ("keep_checkpoints=0", "keep_checkpoints must"),
        ("lora_rank=-1", "lora_rank must"),
    ],
)
def test_bad_overrides_are_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_training_recipe("postcard", [override])


def test_unknown_recipes_and_other_versions_are_refused() -> None:
    with pytest.raises(RecipeError, match="known: postcard, sd15"):
        load_training_recipe("sdxl")
    with pytest.raises(RecipeError, match="another version"):
        training_recipe_from_json('{"name": "x", "momentum": 0.9}')


def test_learning_rate_warms_up_then_stays_or_falls_to_zero() -> None:
    constant = load_training_recipe("sd15", ["warmup=4", "learning_rate=1", "steps=100"])
    assert [learning_rate_at(step, constant) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(constant, schedule="cosine", steps=104)
    assert learning_rate_at(4, cosine) == 1.0
    assert learning_rate_at(54, cosine) == pytest.approx(0.5)
    assert learning_rate_at(104, cosine) == pytest.approx(0.0)
    assert learning_rate_at(200, cosine) == pytest.approx(0.0)
