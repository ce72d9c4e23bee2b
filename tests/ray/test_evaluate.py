"""The evaluation job on a real local Ray: the records of a plain loop, whoever makes which part."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ip2p.editing.editor import Editor
from ip2p.evaluation.edit_success import by_instruction, held_out_examples, measure_edits
from ip2p.models.components import embedded_folder, load_base, load_edit_model
from ip2p.models.export import save_edit_model
from ip2p.models.widening import widen
from ip2p.postcards.reader import load_reader
from jobs import evaluate
from tests.tiny_family import build_clip, build_text_to_image
from tests.tiny_pairs import write_run

# One Ray for all tests of this process: the job takes the one that is there.
pytestmark = [pytest.mark.ray, pytest.mark.weights, pytest.mark.usefixtures("ray_local")]
EXAMPLES = 20  # more than one part


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    build_text_to_image(folder / "text_to_image")
    build_clip(folder / "clip")
    base = load_base(folder / "text_to_image", "cpu")
    widen(base.unet)
    save_edit_model(base, folder / "edit_model")
    return folder


def run(family: Path, output: Path, *more: str) -> int:
    models = ("--set", f"models.text_to_image={family / 'text_to_image'}", "--set", f"models.clip={family / 'clip'}")
    where = ("--model", str(family / "edit_model"), "--output", str(output), "--steps", "2")
    return evaluate.main([*where, *models, "--quiet", *more])


@pytest.mark.timeout(300)
def test_exam_has_the_records_of_a_plain_loop_and_knows_truth_from_nothing(family, tmp_path):
    assert run(family, tmp_path / "exam", "--examples", str(EXAMPLES), "--cfg-text", "2") == 0
    report = json.loads((tmp_path / "exam" / "summary.json").read_text())
    success = {name: result["success"]["mean"] for name, result in report["exam"].items()}
    assert list(success) == ["ours", "sdedit", "no edit", "truth"]
    assert success["truth"] >= 0.85
    assert success["no edit"] == success["ours"] == 0.0  # a network of random weights edits nothing as asked
    records = pq.read_table(tmp_path / "exam" / "records.parquet").to_pylist()
    assert len(records) == 4 * EXAMPLES
    editor = Editor(load_edit_model(family / "edit_model", device="cpu"))
    edit = functools.partial(editor.edit, steps=2, guidance_scale=2, image_guidance_scale=1.5, resolution=64)
    plain = measure_edits(
        by_instruction(edit), held_out_examples(EXAMPLES), load_reader(embedded_folder("reader")),
    )  # fmt: skip
    ours = [record for record in records if record["method"] == "ours"]
    for ray, loop in zip(ours, plain, strict=True):
        assert (ray["example"], ray["seed"], ray["exact"]) == (loop["example"], loop["seed"], loop["exact"])
        assert ray["truth_error"] == pytest.approx(loop["truth_error"], abs=1e-3)
    assert (tmp_path / "exam" / "success.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.timeout(300)
def test_curve_over_pairs_of_a_run(family, tmp_path):
    pairs = write_run(tmp_path / "run", range(8), splits=("train", "test"))
    scales = ("--cfg-image", "1", "2", "--cfg-text", "3")
    assert run(family, tmp_path / "curve", "--curve", "--pairs", pairs, "--examples", "3", *scales) == 0
    points = json.loads((tmp_path / "curve" / "summary.json").read_text())["curve"]
    assert [(point["image_guidance_scale"], point["count"]) for point in points] == [(1.0, 3), (2.0, 3)]
    records = pq.read_table(tmp_path / "curve" / "records.parquet").to_pylist()
    assert {record["sample_id"] for record in records} == {"pair0001", "pair0003", "pair0005"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--examples", "0"], "--examples must be at least 1"),
        (["--pairs", "somewhere"], "--pairs has no known answers"),
        (["--cfg-image", "1", "2"], "the exam takes one"),
        (["--model", "/nowhere"], "/nowhere: no such folder; correct --model"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_cluster_is_joined(family, tmp_path, capsys, arguments, said):
    assert run(family, tmp_path / "out", *arguments) == 1
    assert said in capsys.readouterr().err
