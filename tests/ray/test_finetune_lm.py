"""The fine-tuning job on a real local Ray, with a tiny GPT: a worker killed in the middle, and two workers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from ip2p.storage import open_folder
from ip2p.triplets import fine_tuning
from ip2p.triplets.language_model import LanguageModelWriter
from ip2p.triplets.seed import load_seeds
from ip2p.triplets.writer_model import load_writer_model
from jobs import finetune_lm
from tests.unit.triplets.conftest import _model, _save, _tokenizer

pytestmark = pytest.mark.ray

SETTINGS = ["epochs=2", "batch=4", "lora_rank=0", "held_out=4", "learning_rate=1e-3", "max_tokens=200"]
STEPS = 15  # 30 triplets, twice, by fours


@pytest.fixture(scope="module")
def triplets(tmp_path_factory) -> Path:
    """The shortest of the seeds: the tiny model's tokenizer knows hardly a word of them."""
    path = tmp_path_factory.mktemp("triplets") / "short.jsonl"
    short = sorted(load_seeds(), key=lambda t: len(t.caption + t.instruction + t.edited_caption))[:34]
    fields = ("caption", "instruction", "edited_caption", "task")
    path.write_text("".join(json.dumps({name: getattr(t, name) for name in fields}) + "\n" for t in short))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = _model(seed=4)
    model.transformer.wpe = torch.nn.Embedding(256, 32)
    model.config.n_positions = 256
    _save(folder, model, _tokenizer())
    return folder


def job(base: Path, triplets: Path, output: Path, *more: str) -> int:
    sets = [part for setting in [*SETTINGS, f"base={base}"] for part in ("--set", setting)]
    files = ["--triplets", str(triplets), "--output", str(output)]
    return finetune_lm.main([*files, *sets, "--threads", "1", "--look-captions", "4", "--json", *more])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_writer_model(folder, torch.device("cpu"))[0].state_dict())


def plain_training(base: Path, triplets: Path, output: Path) -> dict[str, torch.Tensor]:
    """What one worker does, without Ray."""
    recipe = finetune_lm.overridden(fine_tuning.FineTuning(), [*SETTINGS, f"base={base}"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, tokenizer = load_writer_model(base, torch.device("cpu"))
        trained, _ = fine_tuning.split_held_out(finetune_lm.read_labelled(str(triplets)), recipe)
        state = fine_tuning.start(fine_tuning.prepare_model(model, recipe), recipe)
        examples = fine_tuning.examples_of(trained, tokenizer, recipe)
        fine_tuning.fine_tune(state, examples, open_folder(str(output)), lambda told: None)
    finally:
        torch.set_num_threads(threads)
    assert state.step == STEPS
    return dict(state.model.state_dict())


def kill_a_worker_after(checkpoint: Path, killed: list[int]) -> None:
    """Once ``checkpoint`` is there, end the process that trains."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not checkpoint.exists():
        time.sleep(0.01)
    for process in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)


def test_a_killed_worker_costs_time_and_no_weight(ray_local, base, triplets, tmp_path, capsys):
    plain = plain_training(base, triplets, tmp_path / "plain")
    killed: list[int] = []
    first_epoch = tmp_path / "run" / "checkpoints" / "step-00000008" / "manifest.json"
    killer = threading.Thread(target=kill_a_worker_after, args=(first_epoch, killed))
    killer.start()
    assert job(base, triplets, tmp_path / "run") == 0
    killer.join()
    assert killed
    for name, weight in weights(tmp_path / "run" / "model").items():
        assert torch.equal(weight, plain[name]), name
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [look["epoch"] for look in summary["looks"]] == [0, 1, 2]
    assert summary["looks"][-1]["held_out_loss"] < summary["looks"][0]["held_out_loss"]
    assert all(sum(look["by_reason"].values()) == 4 for look in summary["looks"])
    LanguageModelWriter(str(tmp_path / "run" / "model"), finetune_lm.Triplets(max_tokens=4), 0).complete(["a"], [(0,)])
    assert job(base, triplets, tmp_path / "run") == 0
    assert "already trained" in capsys.readouterr().err


def test_two_workers_leave_what_one_would(ray_local, base, triplets, tmp_path):
    plain = plain_training(base, triplets, tmp_path / "plain")
    assert job(base, triplets, tmp_path / "run", "--workers", "2", "--look-captions", "0") == 0
    ours = weights(tmp_path / "run" / "model")
    moved = weights(base)
    for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
        assert (plain[name] - moved[name]).abs().max() > 1e-3
        torch.testing.assert_close(ours[name], plain[name], atol=2e-4, rtol=0)
