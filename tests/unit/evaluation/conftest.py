from __future__ import annotations

from pathlib import Path

import pytest
from tiny_family import build_tiny_family


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text_to_image, clip and triplet_lm; not to be written to."""
    folder = tmp_path_factory.mktemp("family")
    build_tiny_family(folder)
    return folder
