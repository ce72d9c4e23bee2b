"""What is said of a recipe's weights before anything is loaded; the folders hold the real layouts at tiny size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ip2p.config import Recipe, load_recipe
from ip2p.errors import CheckpointError, RecipeError
from ip2p.models import components
from ip2p.models.checkpoint import file_sha256, write_manifest
from ip2p.models.components import load_clip, load_text_to_image
from ip2p.models.preflight import check_model_files

FILES = {
    "unet": "text_to_image/unet/diffusion_pytorch_model.safetensors",
    "vae": "text_to_image/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_to_image/text_encoder/model.safetensors",
    "triplet_lm": "triplet_lm/model.safetensors",
    "clip": "clip/open_clip_model.safetensors",
}


@pytest.fixture
def family(tiny_family: Path, tmp_path: Path) -> Path:
    """A private copy, to be damaged."""
    return shutil.copytree(tiny_family, tmp_path / "family")


def of(family: Path | str, writer: str = "lm", **models: str) -> Recipe:
    named = {part: f"{family}/{part}" for part in ("text_to_image", "clip", "triplet_lm")} | models
    overrides = [f"models.{name}={value}" for name, value in named.items()]
    return load_recipe("postcard", [*overrides, f"triplets.writer={writer}"])


def test_each_component_is_named_by_the_digest_of_its_own_file(family: Path) -> None:
    ids = check_model_files(of(family))
    assert ids == {part: file_sha256(family / file) for part, file in FILES.items()}
    assert len(set(ids.values())) == 5


def test_ids_are_those_of_the_models_that_the_workers_load(family: Path) -> None:
    save_file({"unused": torch.ones(1)}, family / "clip" / "model.safetensors")  # open_clip reads the other one
    recipe = of(family)
    ids = check_model_files(recipe)
    loaded = load_text_to_image(recipe.models, "cpu").sha256 | {"clip": load_clip(recipe.models, "cpu").sha256}
    assert {part: ids[part] for part in loaded} == loaded
    assert ids["clip"] == file_sha256(family / FILES["clip"])


@pytest.mark.parametrize("file", FILES.values())
def test_any_weights_cut_short_are_refused_by_name(family: Path, file: str) -> None:
    whole = (family / file).read_bytes()
    (family / file).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{file}: found {len(whole) - 1} bytes, expected {len(whole)}"):
        check_model_files(of(family))


@pytest.mark.parametrize("file", FILES.values())
def test_any_absent_weights_are_refused_by_folder(family: Path, file: str) -> None:
    (family / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{Path(file).parent}\S*: no (such file|\.safetensors file here); name"):
        check_model_files(of(family))


def test_scheduler_that_the_samplers_do_not_know_is_refused(family: Path) -> None:
    (family / "text_to_image" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "flow"}')
    with pytest.raises(CheckpointError, match="found prediction_type 'flow'"):
        check_model_files(of(family))


@pytest.mark.parametrize("name", ["text_to_image", "clip", "triplet_lm"])
def test_model_that_is_not_named_is_a_recipe_error_with_the_option_to_set(family: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"--set models\.{name}=DIR"):
        check_model_files(of(family, **{name: ""}))


@pytest.mark.parametrize("writer", ["http", "given"])
def test_language_model_is_looked_at_only_where_it_writes(family: Path, writer: str) -> None:
    shutil.rmtree(family / "triplet_lm")
    assert "triplet_lm" not in check_model_files(of(family, writer))


def test_embedded_family_is_verified_and_its_altered_file_named(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in family.iterdir():
        write_manifest(part)
    monkeypatch.setattr(components, "EMBEDDED_WEIGHTS", family)
    recipe = load_recipe("postcard")
    assert check_model_files(recipe) == {part: file_sha256(family / file) for part, file in FILES.items()}
    for file in FILES.values():
        whole = (family / file).read_bytes()
        (family / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{file}: found sha256"):
            check_model_files(recipe)
        (family / file).write_bytes(whole)


def test_folders_may_be_named_from_the_home_folder(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(family))
    recipe = of("~")
    assert check_model_files(recipe) == check_model_files(of(family))
    assert load_clip(recipe.models, "cpu").sha256 == file_sha256(family / FILES["clip"])


def test_clip_by_name_is_refused_before_anything_starts_when_name_tag_or_file_is_wrong(family: Path) -> None:
    with pytest.raises(RecipeError, match="'ViT-Z-99' is neither a folder nor an open_clip model name"):
        check_model_files(of(family, clip="ViT-Z-99"))
    with pytest.raises(RecipeError, match="'opnai' is neither a"):
        check_model_files(of(family, clip="ViT-B-32", clip_pretrained="opnai"))
    file = family / FILES["clip"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors: found"):
        check_model_files(of(family, clip="ViT-B-32", clip_pretrained=str(file)))


def test_clip_by_name_is_identified_by_its_tag_or_by_the_bytes_of_its_file(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(family))
    ids = [
        check_model_files(of(family, clip="ViT-B-32", clip_pretrained=tag))["clip"]
        for tag in ("openai", "laion2b_e16", f"~/{FILES['clip']}")
    ]
    assert ids == ["open_clip:ViT-B-32:openai", "open_clip:ViT-B-32:laion2b_e16", file_sha256(family / FILES["clip"])]
