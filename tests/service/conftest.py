from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import RUNNING, Command, Service, SlowCheck, Steps, commanded, serving, until
from tiny_family import build_edit_model

from ip2p.editing.edit_bank import EditBank

KEY = "sesame-open-7f3a"


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model that is served; not to be written to."""
    return build_edit_model(tmp_path_factory.mktemp("served") / "model", 0)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, that answers differently."""
    return build_edit_model(tmp_path_factory.mktemp("served") / "other", 1)


@pytest.fixture(scope="session")
def edit_model(edit_folder: Path):
    """The served model, loaded again: what the library makes of it alone."""
    from ip2p.models.components import load_edit_model

    return load_edit_model(edit_folder, device="cpu")


@pytest.fixture(scope="session")
def service(edit_folder: Path) -> Iterator[Service]:
    """An open server that all tests share."""
    with serving(edit_folder, max_steps=1000) as made:
        yield made


@pytest.fixture(scope="session")
def command(edit_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """``ip2p serve`` with a key, in a process of its own; "day" and "night" are there and not in memory yet."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "keys.txt").write_text(f"# whose\n{KEY}\n")
    models = ["--model", f"day={edit_folder}", "--model", f"night={other_folder}", "--models-held", "3"]
    with commanded(edit_folder, folder / "log.txt", "--keys", str(folder / "keys.txt"), *models, key=KEY) as made:
        yield made


@pytest.fixture
def check() -> Iterator[SlowCheck]:
    made = SlowCheck()
    yield made
    made.enough.set()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """From here on the UNet's calls wait until they are let through; all of them at the end of the test."""
    made = Steps()
    until(lambda: all(service.idle for service in RUNNING), "no edit of a test before is under way")
    monkeypatch.setattr(EditBank, "step", made.around(EditBank.step))
    yield made
    made.let()
