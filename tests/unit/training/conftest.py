"""Twelve kept pairs of 16-pixel pictures and the tiny family: real files, real classes, milliseconds a step."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import torch
from random_rows import RandomRows
from tiny_family import build_text_to_image, tiny_unet
from tiny_pairs import write_run

from ip2p.config import Models
from ip2p.models.components import TextToImage, load_text_to_image
from ip2p.training.encoding import PairEncoder
from ip2p.training.loop import train
from ip2p.training.loss import NoiseSchedule, noise_schedule
from ip2p.training.recipe import TrainingRecipe, load_training_recipe
from ip2p.training.state import TrainingState, start_training


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def run_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve pairs in three shards, nine of them of the train split; not to be written to."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", range(12))


@pytest.fixture
def build_run(tmp_path: Path) -> typing.Callable[..., str]:
    def build(places: typing.Iterable[int], name: str = "built", **options: typing.Any) -> str:
        return write_run(tmp_path / name, places, **options)

    return build


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    folder = tmp_path_factory.mktemp("family") / "text_to_image"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_text_to_image(folder)
    return load_text_to_image(Models(text_to_image=str(folder)), "cpu")


@pytest.fixture(scope="session")
def encoder(model: TextToImage) -> PairEncoder:
    return PairEncoder(model.vae, model.text_encoder, model.tokenizer)


@pytest.fixture(scope="session")
def schedule(model: TextToImage) -> NoiseSchedule:
    return noise_schedule(model.scheduler_config, model.vae.config)


@pytest.fixture(scope="session")
def new_unet() -> typing.Callable[..., typing.Any]:
    return tiny_unet


@pytest.fixture(scope="session")
def recipe() -> TrainingRecipe:
    settings = (
        "steps=6", "global_batch=8", "micro_batch=4", "learning_rate=1e-4", "warmup=2", "resolution=16",
        "checkpoint_every=2", "keep_checkpoints=2", "seed=7",
    )  # fmt: skip
    return load_training_recipe("postcard", settings)


@pytest.fixture(scope="session")
def new_rows() -> type[RandomRows]:
    return RandomRows


@pytest.fixture
def random_rows() -> RandomRows:
    return RandomRows()


@pytest.fixture(scope="session")
def undisturbed(
    new_unet: typing.Callable[..., typing.Any], recipe: TrainingRecipe, new_rows, schedule: NoiseSchedule
) -> TrainingState:
    """A run of all six steps; not to be changed."""
    state = start_training(new_unet(), recipe)
    train(state, new_rows(), schedule)
    return state
