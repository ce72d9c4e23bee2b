"""What jobs/train.py says to bad input, before any cluster starts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from jobs import train
from tests.job_errors import one_error
from tests.tiny_family import build_text_to_image, tiny_unet
from tests.tiny_pairs import write_run

pytestmark = pytest.mark.usefixtures("no_cluster")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "text_to_image"
    build_text_to_image(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return write_run(tmp_path_factory.mktemp("runs") / "run", range(12))


@pytest.fixture
def job(base, pairs, tmp_path, capsys):
    """Runs the job, which must not get as far as a cluster; returns its one error."""

    def run(*more: str, runs: tuple[str, ...] = (pairs,)) -> str:
        arguments = ["--pairs", *runs, "--output", str(tmp_path / "edit"), "--set", f"base={base}"]
        code = train.main([*arguments, "--set", "resolution=16", "--set", "steps=4", *more])
        assert code == 1
        return one_error(capsys.readouterr().err)

    return run


def test_no_run_there(job, tmp_path):
    assert "manifest.json is missing: this is not the folder of a run" in job(runs=(str(tmp_path / "none"),))


def test_run_without_training_pairs(job, tmp_path):
    assert "no pair of split 'train'" in job(runs=(write_run(tmp_path / "val", [2, 6, 10]),))


def test_truncated_shard_is_named(job, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "cut")
    shard = sorted((tmp_path / "cut" / "pairs").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    error = job(runs=(str(tmp_path / "cut"),))
    assert f"{shard.name}: " in error
    assert "bytes, the manifest says" in error


def test_base_of_the_wrong_width(job, base, tmp_path):
    shutil.copytree(base, tmp_path / "wide")
    shutil.rmtree(tmp_path / "wide" / "unet")
    tiny_unet(in_channels=9).save_pretrained(tmp_path / "wide" / "unet")
    error = job("--set", f"base={tmp_path / 'wide'}")
    assert "unet: found in_channels 9, expected 4 or 8" in error


def test_resolution_that_the_autoencoder_does_not_take(job, base, tmp_path):
    shutil.copytree(base, tmp_path / "deep")
    config = tmp_path / "deep" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [8] * 5}))
    error = job("--set", f"base={tmp_path / 'deep'}", "--set", "resolution=24")
    assert "deep/vae: takes sides of multiples of 16 pixels, not resolution=24" in error


def test_base_that_is_not_there(job, tmp_path):
    assert f"{tmp_path / 'none'}: no such folder; correct base (`--set base=DIR`)" in job(
        "--set", f"base={tmp_path / 'none'}"
    )
    assert "base is empty" in job("--set", "base=")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "lerning_rate=1"], "unknown recipe field 'lerning_rate'; known: seed, base"),
        (["--set", "steps=many"], "steps wants int, got 'many'"),
        (["--recipe", "sd3"], "unknown training recipe 'sd3'; known: postcard, sd15"),
        (["--report-to", "paper"], "--report-to paper: known are"),
        (["--report-to", "tensorboard,comet_ml"], "--report-to comet_ml: the package is not there; install it"),
        (["--report-every", "0"], "--report-every is at least 1"),
    ],
)
def test_settings_that_cannot_be_used(job, arguments, said):
    assert said in job(*arguments)


def test_folder_of_another_training_is_refused_with_the_difference(job, base, pairs, tmp_path):
    (tmp_path / "edit").mkdir()
    recipe = train.load_training_recipe("postcard", [f"base={base}", "resolution=16", "steps=4"])
    work = train.prepared(train.arguments(["--pairs", pairs, "--output", str(tmp_path / "edit")]), recipe)
    assert json.loads((tmp_path / "edit" / "about.json").read_text()) == work.about
    error = job("--set", "dropout_rate=0.1")
    assert "dropout_rate is 0.05 there and 0.1 here" in error
    assert "choose another --output" in error
    other = write_run(tmp_path / "other", range(20, 28))
    assert "pairs_train is" in job(runs=(other,))


def test_more_steps_are_no_other_training(base, pairs, tmp_path):
    for steps in (4, 8):
        recipe = train.load_training_recipe("postcard", [f"base={base}", "resolution=16", f"steps={steps}"])
        train.prepared(train.arguments(["--pairs", pairs, "--output", str(tmp_path / "edit")]), recipe)
    assert json.loads((tmp_path / "edit" / "recipe.json").read_text())["steps"] == 8


def test_a_base_that_was_moved_is_the_same_base(base, pairs, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    for where in (base, tmp_path / "moved"):
        recipe = train.load_training_recipe("postcard", [f"base={where}", "resolution=16"])
        train.prepared(train.arguments(["--pairs", pairs, "--output", str(tmp_path / "edit")]), recipe)
    assert json.loads((tmp_path / "edit" / "recipe.json").read_text())["base"] == str(tmp_path / "moved")


def test_what_is_missing_for_low_rank_additions_is_said_first(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "lora_rank needs the package peft" in job("--set", "lora_rank=4")


def test_remedies_for_a_loss_that_is_no_number_are_no_other_training(base, pairs, tmp_path):
    for more in ([], ["learning_rate=1e-5", "precision=bfloat16", "max_grad_norm=0.1"]):
        recipe = train.load_training_recipe("postcard", [f"base={base}", "resolution=16", *more])
        train.prepared(train.arguments(["--pairs", pairs, "--output", str(tmp_path / "edit")]), recipe)
    assert json.loads((tmp_path / "edit" / "recipe.json").read_text())["learning_rate"] == 1e-5


def test_the_folder_of_something_else_is_left_as_it_is(job, pairs):
    before = (Path(pairs) / "manifest.json").read_bytes()
    assert "holds something else (manifest.json); choose another --output" in job("--output", pairs)
    assert (Path(pairs) / "manifest.json").read_bytes() == before


def test_a_base_beside_us_is_named_so_that_workers_find_it(base, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    recipe = train.load_training_recipe("postcard", [f"base={base.name}", "resolution=16"])
    work = train.prepared(train.arguments(["--pairs", pairs, "--output", str(tmp_path / "edit")]), recipe)
    assert work.recipe.base == str(base)


def test_shards_of_low_rank_additions(job):
    assert "--shard and lora_rank exclude each other" in job("--shard", "--set", "lora_rank=4")
    assert "--shard and optimizer=muon exclude each other" in job("--shard", "--set", "optimizer=muon")
