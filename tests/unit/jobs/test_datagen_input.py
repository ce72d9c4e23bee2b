"""What jobs/datagen.py says to bad input, before any cluster starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ip2p.dataset.shards import ShardStats, plan_shards
from ip2p.postcards.captions import postcard_captions
from jobs import datagen
from tests.job_errors import one_error
from tests.tiny_family import build_tiny_family


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    build_tiny_family(folder)
    return folder


@pytest.fixture
def job(family, tmp_path, capsys):
    """Runs the job with the tiny family; returns exit code and what it said on stderr."""

    def run(*more: str, output: str | None = None) -> tuple[int, str]:
        models = [
            part
            for name in ("text_to_image", "clip", "triplet_lm")
            for part in ("--set", f"models.{name}={family / name}")
        ]
        code = datagen.main([*models, "--output", output or str(tmp_path / "run"), *more])
        return code, capsys.readouterr().err

    return run


def test_empty_caption_file(job, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    code, said = job("--captions", str(tmp_path / "none.jsonl"))
    assert code == 1
    assert "none.jsonl: the file is empty; it needs at least one caption" in one_error(said)


def test_missing_column(job, tmp_path):
    (tmp_path / "c.csv").write_text("title,url\na boat,x\n")
    code, said = job("--captions", str(tmp_path / "c.csv"))
    assert code == 1
    error = one_error(said)
    assert "c.csv" in error
    assert "caption" in error
    assert "title" in error


def test_missing_file_and_unknown_suffix(job, tmp_path):
    assert "gone.jsonl" in one_error(job("--captions", str(tmp_path / "gone.jsonl"))[1])
    assert ".jsonl" in one_error(job("--captions", str(tmp_path / "gone.xls"))[1])


def test_unreachable_bucket(job, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    code, said = job(output="s3://no-such-bucket/run")
    assert code == 1
    assert "s3://no-such-bucket/run" in one_error(said)
    assert "AWS_ENDPOINT_URL" in said


def test_corrupt_weight_file(job, family):
    path = next((family / "text_to_image" / "unet").glob("*.safetensors"))
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        code, said = job("--prompts", "2")
        assert code == 1
        error = one_error(said)
        assert str(path) in error
        assert str(len(whole) // 2) in error
        assert str(len(whole)) in error
    finally:
        path.write_bytes(whole)


def test_a_model_that_is_not_named(job):
    code, said = job("--prompts", "2", "--set", "models.text_to_image=")
    assert code == 1
    assert "--set models.text_to_image=DIR" in one_error(said)


def test_a_folder_of_another_recipe_is_not_mixed(job, tmp_path):
    (tmp_path / "run").mkdir()
    recipe = datagen.load_recipe("postcard", ["pairs.steps=7"])
    (tmp_path / "run" / "recipe.json").write_text(recipe.to_json())
    code, said = job("--prompts", "2")
    assert code == 1
    assert "pairs.steps is 7 there and 12 here" in one_error(said)


def test_a_folder_of_other_weights_is_not_mixed(job, tmp_path, monkeypatch):
    monkeypatch.setattr(datagen, "make_pairs", lambda *parts: pytest.fail("went on"))
    with pytest.raises(pytest.fail.Exception):
        job("--prompts", "2")
    path = tmp_path / "run" / "weights.json"
    weights = json.loads(path.read_text())
    assert set(weights) == {"unet", "vae", "text_encoder", "triplet_lm", "clip"}
    path.write_text(json.dumps({**weights, "unet": "0" * 64}))
    code, said = job("--prompts", "2")
    assert code == 1
    assert "other weights of unet" in one_error(said)


def test_a_mistake_at_the_start_does_not_claim_the_folder(job, tmp_path):
    job("--prompts", "2", "--set", "models.text_to_image=/no/such/folder")
    job("--captions", str(tmp_path / "gone.jsonl"))
    assert not (tmp_path / "run").exists()


def test_triplets_without_instructions_are_named(job, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"caption": "a boat"}\n{"caption": "a house"}\n')
    code, said = job("--triplets", str(tmp_path / "t.jsonl"))
    assert code == 1
    assert "t.jsonl: holds captions but no triplets" in one_error(said)


def test_one_row_without_an_instruction_is_left_out(tmp_path):
    lines = [{"input": "a boat", "edit": "make it red", "output": "a red boat"}, {"input": "a house"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = datagen.arguments(["--triplets", str(tmp_path / "t.jsonl"), "--output", "x"])
    found = datagen.read_input(args, datagen.load_recipe("postcard", ["triplets.writer=given"]))
    assert [row.instruction for row in found.rows] == ["make it red"]
    assert [(bad.line, "instruction or edit" in bad.message) for bad in found.bad] == [(2, True)]


def test_output_is_made_absolute_and_never_lies_in_rays_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert datagen.located("out/x") == str(tmp_path / "out" / "x")
    assert datagen.located("s3://bucket/x") == "s3://bucket/x"
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1234"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(datagen.InputError, match="absolute path"):
        datagen.located("out/x")
    assert datagen.located("/data/x") == "/data/x"


def write_shard_files(run: Path, name: str) -> None:
    """What makes a shard count as finished; its tables are empty."""
    files = {f"{kind}/{name}.parquet": {"bytes": 0, "sha256": "", "rows": 0} for kind in ("pairs", "ledger")}
    stats = ShardStats(files, 4, 0, 0, 0, {"refused": 4}, {})
    for file in (*files, f"stats/{name}.json"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(json.dumps(dataclasses.asdict(stats)) if file.startswith("stats/") else "")


def test_a_folder_of_other_captions_is_not_mixed(job, tmp_path):
    write_shard_files(tmp_path / "run", "part-00000-deadbeef")
    code, said = job("--prompts", "4")
    assert code == 1
    assert "part-00000-deadbeef" in one_error(said)
    assert "choose another --output" in said


@pytest.mark.parametrize(
    ("name", "job_of_others"),
    [
        ("manifest.json", "an import, whose note went astray"),
        ("import.json", "an import that was cut off"),
        ("triplet_run.json", "--stage triplets"),
        ("about.json", "a training"),
        ("fine_tuning.json", "a fine-tuning"),
        ("summary.json", "an evaluation"),
    ],
)
def test_a_folder_of_another_job_is_not_taken(job, tmp_path, name, job_of_others):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(datagen.load_recipe("postcard").to_json())
    (tmp_path / "run" / name).write_text("{}")
    code, said = job("--prompts", "4")
    assert code == 1
    assert f"holds something else ({name})" in one_error(said), job_of_others
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(("recipe.json", name))


def test_a_command_that_is_refused_leaves_the_list_of_bad_rows_alone(job, tmp_path, monkeypatch):
    monkeypatch.setattr(datagen, "make_pairs", lambda *parts: pytest.fail("went on"))
    with pytest.raises(pytest.fail.Exception):
        job("--prompts", "2")
    write_shard_files(tmp_path / "run", "part-00000-deadbeef")
    (tmp_path / "run" / "bad_rows.jsonl").write_text("those of the run\n")
    code, said = job("--prompts", "4")
    assert code == 1
    assert "of other captions" in one_error(said)
    assert (tmp_path / "run" / "bad_rows.jsonl").read_text() == "those of the run\n"


def test_many_changed_captions_are_made_anew_when_asked_for(job, tmp_path, monkeypatch):
    todo = []
    monkeypatch.setattr(datagen, "make_pairs", lambda args, recipe, folder, run, prompts: todo.append(run.todo))
    monkeypatch.setattr(datagen, "finish", lambda *parts: 0)
    plan = plan_shards(postcard_captions(40).rows, datagen.load_recipe("postcard"))
    for shard in plan[:6]:
        write_shard_files(tmp_path / "run", shard.name)
    for number in range(6, 10):
        write_shard_files(tmp_path / "run", f"part-{number:05d}-deadbeef")
    code, said = job("--prompts", "40")
    assert (code, todo) == (1, [])
    assert "--redo-changed" in one_error(said)
    code, said = job("--prompts", "40", "--redo-changed")
    assert (code, todo) == (0, [plan[6:]])
    assert "warning: 4 finished shards hold other captions than now" in said
    assert len(list((tmp_path / "run" / "stats").iterdir())) == 6


@pytest.mark.parametrize(
    "flag", ["--max-cost=3", "--requests-per-minute=10", "--concurrency=8", "--timeout=60", "--engine=auto"]
)
def test_a_flag_of_writing_triplets_alone_is_refused_elsewhere(job, no_cluster, tmp_path, flag):
    code, said = job("--prompts", "2", flag)
    assert code == 1
    assert f"{flag.partition('=')[0]}: heeded by --stage triplets alone" in one_error(said)
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_named_and_listed(tmp_path, capsys):
    lines = [json.dumps({"caption": f"a red boat number {i}"}) for i in range(1, 31)]
    lines[16] = '{"caption": broken'
    lines[20] = json.dumps({"caption": "x" * 5000})
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(lines))
    args = datagen.arguments(["--captions", str(path), "--output", str(tmp_path / "run")])
    captions = datagen.read_input(args, datagen.load_recipe("postcard"))
    datagen.report_bad_rows(datagen.open_folder(args.output), captions)
    said = capsys.readouterr().err
    assert f"{path}, line 17: " in said
    assert "line 21" in said
    assert "5000" in said
    assert len(captions.rows) == 28
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [17, 21]


def test_given_originals_come_with_the_captions(job, tmp_path, monkeypatch):
    code, said = job("--prompts", "2", "--set", "pairs.original=given")
    assert code == 1
    assert "column url" in one_error(said)
    (tmp_path / "captions.jsonl").write_text('{"caption": "a boat", "url": "boat.png"}\n')
    monkeypatch.chdir(tmp_path)
    for stage, original, picture in (("all", "given", f"{tmp_path}/boat.png"), ("all", "painted", ""),
                                     ("triplets", "given", "")):  # fmt: skip
        args = datagen.arguments(["--captions", "captions.jsonl", "--output", "x", "--stage", stage])
        found = datagen.read_input(args, datagen.load_recipe("postcard", [f"pairs.original={original}"]))
        assert [(row.url, row.picture) for row in found.rows] == [("boat.png", picture)]


@pytest.mark.parametrize("value", ["0:2", "3:1", "a:b", ""])
def test_pool_sizes_are_checked(value, capsys):
    with pytest.raises(SystemExit):
        datagen.arguments(["--output", "x", "--painters", value])
    assert "MIN" in capsys.readouterr().err


def test_sd15_needs_captions(job):
    code, said = job("--recipe", "sd15")
    assert code == 1
    assert "--captions" in one_error(said)


def test_captions_and_triplets_exclude_each_other(job):
    assert "exclude each other" in one_error(job("--captions", "a.txt", "--triplets", "b.txt")[1])


@pytest.mark.parametrize(("kept", "errors", "bad", "code"), [(5, 0, 0, 0), (0, 0, 0, 3), (5, 1, 0, 3), (5, 0, 2, 3)])
def test_exit_code_says_whether_all_could_be_used(kept, errors, bad, code):
    reasons = {"accepted": 3, "error": errors}
    summary = {"kept_pairs": kept, "prompts_by_reason": reasons, "bad_input_rows": bad, "kept_by_reason": {}}
    assert datagen.exit_code(summary) == code
