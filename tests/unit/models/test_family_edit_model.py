from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tiny_family import tiny_unet

from ip2p.config import Models
from ip2p.errors import CheckpointError
from ip2p.models.components import EditModel, load_edit_model, load_text_to_image
from ip2p.models.export import save_edit_model
from ip2p.postcards.family.edit_model import take_in_edit_model


@pytest.fixture
def family(tiny_family: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_family / "text_to_image", tmp_path / "family" / "text_to_image")
    return tmp_path / "family"


@pytest.fixture
def made(tiny_family: Path, tmp_path: Path) -> Path:
    base = load_text_to_image(Models(text_to_image=str(tiny_family / "text_to_image")), "cpu")
    model = EditModel(**{**vars(base), "unet": tiny_unet(in_channels=8)}, guidance_scale=3.0)
    save_edit_model(model, tmp_path / "made")
    return tmp_path / "made"


def test_it_loads_from_the_family_and_shares_the_files_that_are_the_same(made: Path, family: Path) -> None:
    (family / "edit_model").mkdir()
    (family / "edit_model" / "old.safetensors").write_bytes(b"of a model before")
    take_in_edit_model(made, family)
    loaded, expected = load_edit_model(family / "edit_model", device="cpu"), load_edit_model(made, device="cpu")
    assert dataclasses.asdict(loaded)["guidance_scale"] == 3.0
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), expected.unet.parameters(), strict=True))
    links = {str(p.relative_to(family / "edit_model")) for p in (family / "edit_model").rglob("*") if p.is_symlink()}
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= links
    assert "unet/diffusion_pytorch_model.safetensors" not in links
    assert not (family / "edit_model" / "old.safetensors").exists()


def test_links_hold_when_the_family_is_moved(made: Path, family: Path, tmp_path: Path) -> None:
    take_in_edit_model(made, family)
    shutil.move(family, tmp_path / "elsewhere")
    load_edit_model(tmp_path / "elsewhere" / "edit_model", device="cpu")


def test_what_is_no_export_or_no_longer_whole_leaves_the_old_model_alone(made: Path, family: Path) -> None:
    (family / "edit_model").mkdir()
    with pytest.raises(CheckpointError, match=r"found no manifest\.json, expected a model of jobs/train\.py"):
        take_in_edit_model(family / "text_to_image" / "unet", family)
    weights = made / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="export it again"):
        take_in_edit_model(made, family)
    assert (family / "edit_model").is_dir()
