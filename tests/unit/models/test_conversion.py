"""An original .ckpt to a folder and back, read where neither network nor keys are."""

from __future__ import annotations

import os
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import build_edit_model

from ip2p.cli import main
from ip2p.errors import CheckpointError, InputError
from ip2p.models.components import load_edit_model
from ip2p.models.conversion import convert
from ip2p.models.original_layout import original_state, read_original

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_edit_model(tmp_path_factory.mktemp("edit") / "model")


def same_models(one: Path, other: Path) -> bool:
    models = [load_edit_model(path, device="cpu") for path in (one, other)]
    states = [{part: getattr(model, part).state_dict() for part in PARTS} for model in models]
    return all(torch.equal(states[0][part][name], states[1][part][name]) for part in PARTS for name in states[0][part])


def test_a_folder_becomes_one_file_and_again_the_same_folder(folder, tmp_path, capsys) -> None:
    file = tmp_path / "original.safetensors"
    assert main(["weights", "convert", str(folder), str(file)]) == 0
    assert main(["weights", "convert", str(file), str(tmp_path / "back"), "--base", str(folder)]) == 0
    assert same_models(folder, tmp_path / "back")
    assert "converted from" in capsys.readouterr().out


def test_a_pickled_checkpoint_of_tensors_becomes_the_folder_it_came_from(folder, tmp_path) -> None:
    state = original_state(load_edit_model(folder, device="cpu"))
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "old.ckpt")
    convert(tmp_path / "old.ckpt", tmp_path / "made", str(folder))
    assert same_models(folder, tmp_path / "made")


class Payload:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_holds_code_is_refused_and_not_run(folder, tmp_path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt: .* found .*system, which could run code"):
        convert(tmp_path / "evil.ckpt", tmp_path / "made", str(folder))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "made").exists()


def test_the_reader_of_pickles_has_neither_network_nor_keys(folder, tmp_path, monkeypatch) -> None:
    """What it finds is written down by a stand-in for the reader, in the very process that reads."""
    spy = tmp_path / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        "import os, socket, atexit\n"
        "def look():\n"
        "    names = sorted(name for name in os.environ if name.startswith(('AWS_', 'HF_TOKEN', 'RAY_AUTH')))\n"
        "    try:\n"
        "        with socket.create_connection(('127.0.0.1', int(os.environ['SPY_PORT'])), 2): reached = True\n"
        "    except OSError: reached = False\n"
        f"    open({str(tmp_path / 'seen')!r}, 'w').write(f'{{reached}} {{names}}')\n"
        "import sys\n"
        "if 'ip2p.models.conversion' in ' '.join(sys.orig_argv): atexit.register(look)\n"
    )
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("SPY_PORT", str(server.getsockname()[1]))
        monkeypatch.setenv("PYTHONPATH", f"{spy}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("HF_TOKEN", "secret")
        torch.save({"state_dict": original_state(load_edit_model(folder, device="cpu"))}, tmp_path / "old.ckpt")
        convert(tmp_path / "old.ckpt", tmp_path / "made", str(folder))
    if "True" in (tmp_path / "seen").read_text() and os.geteuid() != 0:
        pytest.skip("this kernel gives ordinary users no namespaces")
    assert (tmp_path / "seen").read_text() == "False []"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "found an empty file; fetch the file again"),
        (b"<html>please log in</html>", "found text that begins with '<html>please log in"),
        (b"PK\x03\x04" + b"0" * 100, "found 104 bytes of a file that was cut short"),
        (bytes(range(200)), "found 200 bytes that are no torch file, or a damaged one"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, data, said) -> None:
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        read_original(tmp_path / "bad.ckpt")


def test_names_that_do_not_fit_are_refused(folder, tmp_path) -> None:
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        convert(folder, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "none.ckpt", tmp_path / "made", str(folder))
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match="--base is missing"):
        convert(tmp_path / "old.ckpt", tmp_path / "made")


def test_the_written_file_holds_the_originals_names(folder, tmp_path) -> None:
    convert(folder, tmp_path / "original.safetensors")
    names = load_file(tmp_path / "original.safetensors")
    assert "model.diffusion_model.input_blocks.0.0.weight" in names
