"""What jobs/evaluate.py says to bad input, before any cluster starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ip2p.config import Models
from ip2p.models.components import EditModel, load_text_to_image
from ip2p.models.export import save_edit_model
from ip2p.storage import LocalFolder
from jobs import evaluate
from tests.job_errors import one_error
from tests.tiny_family import build_text_to_image, tiny_unet

pytestmark = pytest.mark.usefixtures("no_cluster")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_text_to_image(folder / "text_to_image")
    base = load_text_to_image(Models(text_to_image=str(folder / "text_to_image")), "cpu")
    save_edit_model(EditModel(**{**vars(base), "unet": tiny_unet(in_channels=8)}, guidance_scale=3.0), folder / "edit")
    return folder / "edit"


@pytest.fixture
def job(model, tmp_path, capsys):
    """Runs the job, which must not get as far as a cluster; returns its one error."""

    def run(*more: str, of: Path = model) -> str:
        code = evaluate.main(["--model", str(of), "--output", str(tmp_path / "out"), *more])
        assert code == 1
        return one_error(capsys.readouterr().err)

    return run


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--strength", "2"), "--strength must be between 0 and 1"),
        (("--examples", "0"), "--examples must be at least 1, got 0"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--cfg-text", "-1"), "guidance_scale must be between 0"),
        (("--cfg-image", "1", "2000"), "image_guidance_scale must be between 0"),
        (("--cfg-image", "1", "2"), "the exam takes one --cfg-text and one --cfg-image; several are for --curve"),
        (("--pairs", "out/run"), "add --curve, or leave it out"),
        (("--recipe", "sd16"), "unknown recipe 'sd16'"),
        (("--curve", "--pairs", "no-such-run"), "no-such-run"),
    ],
)
def test_bad_settings(job, flags, problem):
    assert problem in job(*flags)


def test_a_folder_that_is_no_edit_model(job, tmp_path):
    assert "no such folder; correct --model" in job(of=tmp_path / "none")


def test_the_folder_of_a_training(job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "about.json").write_text("{}")
    assert "holds something else (about.json); choose another --output" in job()


def test_numbers_of_another_evaluation_are_not_written_over(job, model, tmp_path):
    args = evaluate.arguments(["--model", str(model), "--output", str(tmp_path / "out"), "--methods", "ours"])
    shown = evaluate.shown_settings(args, evaluate.checked(args, evaluate.load_recipe("postcard")))
    assert len(shown["weights"]["edit_model_unet"]) == 64
    assert shown["recipe"]["models"]["clip"] == "embedded"
    folder = LocalFolder(tmp_path / "out")
    folder.write("records.parquet", b"")
    folder.write("summary.json", json.dumps({"exam": {}, "settings": shown}).encode())
    evaluate.claim_folder(folder, "exam", shown)  # the same measured again
    assert "holds an evaluation of something else (differs in steps); choose another --output" in job(
        "--methods", "ours", "--steps", "4"
    )
    assert "(differs in curve)" in job("--curve", "--methods", "ours")


def test_a_model_beside_us_is_named_so_that_workers_find_it(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    args = evaluate.arguments(["--model", model.name, "--methods", "ours"])
    assert evaluate.checked(args, evaluate.load_recipe("postcard")).model == str(model)


def test_scales_are_the_models_own_unless_asked_otherwise(model):
    def chosen(*flags: str) -> tuple[tuple[float, ...], ...]:
        args = evaluate.arguments(["--model", str(model), *flags])
        settings = evaluate.checked(args, evaluate.load_recipe("postcard"))
        return settings.guidance_scales, settings.image_guidance_scales

    assert chosen() == ((3.0,), (1.5,))
    assert chosen("--cfg-text", "5", "--cfg-image", "1.2") == ((5.0,), (1.2,))
    assert chosen("--curve") == ((3.0,), (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2))
