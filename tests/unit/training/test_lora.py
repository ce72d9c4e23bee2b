from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable

import pytest

from ip2p.errors import InputError
from ip2p.training.recipe import TrainingRecipe
from ip2p.training.state import start_training


def test_lora_without_peft_says_how_to_get_it(
    new_unet: Callable[..., typing.Any], recipe: TrainingRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install peft.*--set lora_rank=0"):
        start_training(new_unet(), dataclasses.replace(recipe, lora_rank=4))
