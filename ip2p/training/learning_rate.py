"""The learning rate of each step: a warm-up, then constant (as in the original) or a cosine down to zero."""

from __future__ import annotations

import math

from ip2p.training.recipe import TrainingRecipe


def learning_rate_at(step: int, recipe: TrainingRecipe) -> float:
    """The rate of the optimizer step that follows ``step`` finished ones."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
