"""What ``--stage triplets`` refuses before anything runs, and how vLLM would be asked."""

import importlib.util
import json
import tracemalloc

import pytest

from ip2p.config import Placement, load_recipe
from ip2p.errors import InputError
from ip2p.storage import open_folder
from ip2p.triplets import written
from ip2p.triplets.assembly import Pacing, default_writing
from ip2p.triplets.captions import read_captions
from ip2p.triplets.format import STOP
from ip2p.triplets.writing import Writing, WritingRun
from jobs import _ray_triplets, _triplet_stage, datagen


def prepared(*flags):
    args = datagen.arguments(["--stage", "triplets", *flags])
    return _triplet_stage.prepared(_triplet_stage.with_defaults(args))


def test_settings_go_to_the_recipe_and_to_the_writing():
    run, pacing = prepared("--set", "triplets.tries=2", "--set", "writing.shares=even", "--concurrency", "3")
    assert run.recipe.triplets.tries == 2
    assert (run.writing.shares, run.writing.types) == ("even", "postcard")
    assert pacing == Pacing(concurrency=3)


def test_the_types_are_those_that_the_writer_knows():
    assert default_writing(load_recipe("postcard")).types == "postcard"
    assert default_writing(load_recipe("postcard", ["models.triplet_lm=/x"])).types == "open"
    assert default_writing(load_recipe("sd15")).types == "open"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--triplets", "x.jsonl"], "--triplets brings them"),
        (["--set", "triplets.writer=given"], "needs a writer"),
        (["--set", "writing.speed=1"], "unknown recipe field 'speed'; known: per_caption, types, shares"),
        (["--max-cost", "3"], "needs prices"),
        (["--redo-changed"], "shards of pairs"),
        (["--painters", "1:2"], "nothing is painted here; --writers"),
        (["--painter-gpus", "0.5"], "nothing is painted here; --writers"),
        (["--concurrency", "0"], "--concurrency wants at least 1"),
        (["--set", "triplets.writer=http", "--set", "writing.judge=lm"], "writing.judge is http"),
        (["--set", "writing.moderation=nowhere:check"], "cannot find 'nowhere:check'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(flags, message):
    with pytest.raises(InputError, match=message):
        prepared(*flags)


def test_a_folder_never_mixes_two_runs(tmp_path):
    folder = open_folder(str(tmp_path))
    run = WritingRun(load_recipe("postcard"), Writing())
    _triplet_stage.claim_folder(folder, run)
    _triplet_stage.claim_folder(folder, run)
    with pytest.raises(InputError, match="holds a run with another writing"):
        _triplet_stage.claim_folder(folder, WritingRun(load_recipe("postcard"), Writing(per_caption=2)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match="holds something else"):
        _triplet_stage.claim_folder(open_folder(str(tmp_path / "other")), run)


def test_finished_rows_are_not_held_while_shards_are_written(tmp_path, monkeypatch):
    folder, held = open_folder(str(tmp_path / "run")), []
    row = {field.name: "" if field.type == "string" else 0 for field in written.SCHEMA}
    row |= {"status": "accepted", "reason": "ok", "refusals": "{}", "url": "x" * 10_000}
    for part in range(20):
        rows = [{**row, "prompt_id": f"{part}-{n}", "index": part} for n in range(16)]
        written.write_part(folder, f"part-{part:05d}-a", rows)
    (tmp_path / "captions.txt").write_text("a red boat")
    monkeypatch.setattr(_triplet_stage, "work", lambda *_: held.append(tracemalloc.get_traced_memory()))
    flags = ["--stage", "triplets", "--captions", str(tmp_path / "captions.txt"), "--output", folder.uri, "--json"]
    flags += ["--set", "writing.near_duplicate=0"]
    assert datagen.run(datagen.arguments(flags)) == 0  # loads what is loaded late
    tracemalloc.start()
    try:
        assert datagen.run(datagen.arguments(flags)) == 0
    finally:
        tracemalloc.stop()
    at_work, most = held[-1]
    assert at_work < 200_000
    assert most < 800_000  # all urls are 3.2 million


# ---- vLLM: only what can be said without GPUs


@pytest.mark.parametrize("actors", [(1, 1), (1, 4), (2, 2)])
def test_rays_own_configuration_takes_our_settings(actors):
    from ray.data.llm import vLLMEngineProcessorConfig

    settings = _ray_triplets.vllm_settings("/models/writer", Placement(lm_actors=actors, lm_gpus=0.5))
    config = vLLMEngineProcessorConfig(**settings)
    assert config.model_source == "/models/writer"
    assert config.concurrency == (actors[1] if actors[0] == actors[1] else actors)
    assert config.should_continue_on_error
    assert config.engine_kwargs["gpu_memory_utilization"] == 0.5


def test_vllm_takes_only_settings_that_it_knows():
    from pydantic import ValidationError
    from ray.data.llm import vLLMEngineProcessorConfig

    settings = _ray_triplets.vllm_settings("/models/writer", Placement(lm_gpus=1.0))
    with pytest.raises(ValidationError):
        vLLMEngineProcessorConfig(**{**settings, "bach_size": 3})


def test_a_row_for_vllm_is_the_writers_prompt_in_tokens_with_a_seed_of_its_own():
    run = WritingRun(load_recipe("postcard"), Writing())
    writer = _ray_triplets.VllmWriter.__new__(_ray_triplets.VllmWriter)
    writer.triplets, writer.seed, writer.tokenizer = run.recipe.triplets, 7, None
    writer.manner = type("Manner", (), {"token_ids": lambda self, tokenizer, prompt: [1, 2, 3]})()
    first, again, other = (writer.request(5, "a cat\n##\n", ("a", 0, n)) for n in (0, 0, 1))
    assert (first["place"], first["tokenized_prompt"]) == (5, [1, 2, 3])
    assert first == again
    assert first["sampling_params"]["seed"] != other["sampling_params"]["seed"]
    assert first["sampling_params"]["stop"] == [STOP]


def test_answers_and_errors_of_vllm_are_told_apart():
    columns = _ray_triplets.answer_columns
    assert columns({"place": 1, "generated_text": "x", "__inference_error__": ""})["text"] == "x"
    assert columns({"place": 1, "generated_text": None, "__inference_error__": "too long"})["error"] == "too long"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is there")
def test_without_vllm_or_gpus_the_remedy_is_named():
    with pytest.raises(InputError, match="needs the package vllm"):
        _ray_triplets.VllmWriter(WritingRun(load_recipe("postcard"), Writing()), Placement(lm_gpus=1.0))
    with pytest.raises(InputError, match="--engine vllm needs GPUs"):
        _triplet_stage.engine_of("vllm", Placement())
    assert _triplet_stage.engine_of("auto", Placement(lm_gpus=1.0)) == "transformers"


def test_places_of_pictures_are_made_absolute_because_the_triplets_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    urls = ["a.png", "/abs/b.png", "s3://bucket/c.png", "https://host/d.png", ""]
    lines = [json.dumps({"caption": f"boat {n}", "url": url}) for n, url in enumerate(urls)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    found = _triplet_stage.with_places(read_captions("c.jsonl"), "c.jsonl")
    assert [row.url for row in found.rows] == [f"{tmp_path}/a.png", *urls[1:]]
