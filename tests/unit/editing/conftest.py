from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_family import build_text_to_image, tiny_unet


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder whose UNet takes 8 channels; 16-pixel pictures, v-prediction; not to be written to."""
    import torch

    folder = tmp_path_factory.mktemp("edit") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_text_to_image(folder)
    shutil.rmtree(folder / "unet")
    tiny_unet(in_channels=8).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def edit_model(edit_folder: Path):
    from ip2p.models.components import load_edit_model

    return load_edit_model(edit_folder, device="cpu")


@pytest.fixture
def pictures() -> list[np.ndarray]:
    """Three pictures of 16 x 16 pixels."""
    return list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
