"""``ip2p edit`` end to end on a tiny model, and what it says when something is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_family import tiny_unet

from ip2p.cli import main
from ip2p.editing.before_after import GAP, HEAD, THUMB
from ip2p.editing.editor import Editor
from ip2p.images import decode_image, encode_image
from ip2p.models import components


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(2).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "in.png").write_bytes(encode_image(pixels))
    return tmp_path / "in.png"


def edit(picture: Path, ckpt: Path, *more: str, output: str = "out.png") -> int:
    arguments = ["--input", str(picture), "--output", str(picture.parent / output), "--ckpt", str(ckpt), "--quiet"]
    return main(["edit", *arguments, *more])


def test_result_is_that_of_the_editor_with_the_flags_passed_on(picture, edit_folder, edit_model, capsys):
    flags = ("--edit", "make it night", "--steps", "3", "--resolution", "12", "--seed", "7", "--cfg-text", "4",
             "--cfg-image", "1.2", "--negative", "snow", "--sampler", "dpmpp_2m")  # fmt: skip
    assert edit(picture, edit_folder, *flags) == 0
    expected = Editor(edit_model).edit(
        [decode_image(picture.read_bytes())], ["make it night"], steps=3, resolution=12, seed=7, guidance_scale=4.0,
        image_guidance_scale=1.2, negative_prompt="snow", sampler="dpmpp_2m",
    )[0]  # fmt: skip
    assert np.array_equal(decode_image((picture.parent / "out.png").read_bytes()), expected)
    assert "12 x 8 pixels, --seed 7" in capsys.readouterr().out


def test_random_seed_is_printed_and_repeats_the_edit(picture, edit_folder, capsys):
    flags = ("--edit", "make it night", "--steps", "1")
    assert edit(picture, edit_folder, *flags) == 0
    first = (picture.parent / "out.png").read_bytes()
    seed = capsys.readouterr().out.split("--seed ")[1].strip()
    assert edit(picture, edit_folder, *flags, "--seed", seed) == 0
    assert (picture.parent / "out.png").read_bytes() == first


def test_size_of_the_input_can_be_had_back_and_jpeg_written(picture, edit_folder):
    assert edit(picture, edit_folder, "--edit", "add a moon", "--steps", "1", "--restore-size", output="out.JPG") == 0
    written = (picture.parent / "out.JPG").read_bytes()
    assert written[:3] == b"\xff\xd8\xff"
    assert decode_image(written).shape == (20, 30, 3)


def test_before_and_after_come_side_by_side_in_their_own_shape(picture, edit_folder):
    compared = picture.parent / "compared.png"
    flags = ("--edit", "add a moon", "--steps", "1", "--resolution", "12", "--compare", str(compared))
    assert edit(picture, edit_folder, *flags) == 0
    sheet = decode_image(compared.read_bytes())
    before, after = sheet[HEAD : HEAD + THUMB, GAP : GAP + THUMB], sheet[HEAD : HEAD + THUMB, 2 * GAP + THUMB : -GAP]
    assert (before[:21] == 255).all()  # 30 x 20 pixels in a square: white above,
    assert (before[22:106].std(axis=(0, 1)) > 50).all()  # the picture,
    assert (before[107:] == 255).all()  # white below
    assert after.shape == before.shape
    edited = decode_image((picture.parent / "out.png").read_bytes())
    assert np.array_equal(after[THUMB // 2, THUMB // 2], edited[edited.shape[0] // 2, edited.shape[1] // 2])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--steps", "0"), "steps must be at least 1"), (("--cfg-text", "-1"), "guidance_scale must be between"),
        (("--output", "out.gif"), "ends in .png, .jpg, .jpeg"), (("--seed", "-5"), "seed must be between"),
        (("--input", "nowhere.png"), "nowhere.png: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_in_one_line_before_the_model_is_loaded(picture, capsys, flags, problem):
    assert edit(picture, Path("no-such-folder"), "--edit", "make it night", *flags) == 1
    errors = capsys.readouterr().err
    assert problem in errors
    assert errors.count("\n") == 1
    assert not (picture.parent / "out.png").exists()


def test_text_to_image_folder_is_refused_with_what_to_do(picture, edit_folder, tmp_path, capsys):
    folder = shutil.copytree(edit_folder, tmp_path / "base")
    shutil.rmtree(folder / "unet")
    tiny_unet().save_pretrained(folder / "unet")
    assert edit(picture, folder, "--edit", "make it night") == 1
    errors = capsys.readouterr().err
    assert "found in_channels 4, expected 8 (this is a text-to-image model; train first" in errors


def test_shipped_model_is_the_default_and_its_absence_is_said_with_the_remedy(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(components, "EMBEDDED_WEIGHTS", tmp_path / "weights")
    assert main(["edit", "--input", str(picture), "--output", str(tmp_path / "o.png"), "--edit", "make it night"]) == 1
    errors = capsys.readouterr().err
    assert "edit_model: no such folder, expected the embedded weights; run `make weights`" in errors
