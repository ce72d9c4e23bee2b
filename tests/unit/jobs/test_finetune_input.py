"""What jobs/finetune_lm.py refuses before any cluster starts, and the file that it writes without one."""

import json

import pytest

from ip2p.triplets.seed import load_seeds
from jobs import finetune_lm


@pytest.fixture
def job(tmp_path, capsys):
    """Runs the job; returns exit code and what it said on stderr."""

    def run(*flags):
        code = finetune_lm.main(["--output", str(tmp_path / "run"), *flags])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "base is empty; name a model folder or a .gguf file"),
        (["--set", "base=/nowhere/model"], "/nowhere/model: no such model"),
        (["--set", "base=embedded", "--set", "held_out=850"], "850 triplets leave none to train on"),
        (["--set", "base=embedded", "--set", "rank=3"], "unknown recipe field 'rank'; known: base, prompt_format"),
        (["--set", "base=embedded", "--micro-batch", "0"], "--micro-batch is at least 1"),
    ],
)
def test_what_cannot_work_is_refused_at_once(job, flags, message):
    code, said = job(*flags)
    assert code == 1
    assert message in said


def test_triplets_without_types_are_refused_unless_none_are_learnt(job, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        json.dumps({"caption": "a cat", "instruction": "make it night", "edited_caption": "a cat at night"})
    )
    code, said = job("--set", "base=embedded", "--triplets", str(path))
    assert code == 1
    assert "a triplet has no task; label all of them, or pass --set tasks=0" in said


def test_a_bad_row_is_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    good = {"caption": "a cat", "instruction": "make it night", "edited_caption": "a cat at night"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"caption": "a dog"}) + "\n")
    assert [triplet.caption for triplet in finetune_lm.read_labelled(str(path))] == ["a cat"]
    assert "line 2: a triplet also needs instruction" in capsys.readouterr().err


def test_a_folder_never_mixes_two_trainings(tmp_path):
    from ip2p.errors import InputError
    from ip2p.storage import open_folder
    from ip2p.triplets.fine_tuning import FineTuning

    folder = open_folder(str(tmp_path))
    finetune_lm.claim_folder(folder, FineTuning(base="x"), load_seeds())
    finetune_lm.claim_folder(folder, FineTuning(base="x"), load_seeds())
    with pytest.raises(InputError, match="epochs is 3 there and 4 here"):
        finetune_lm.claim_folder(folder, FineTuning(base="x", epochs=4), load_seeds())
    with pytest.raises(InputError, match="triplets is"):
        finetune_lm.claim_folder(folder, FineTuning(base="x"), load_seeds()[1:])


def test_the_file_for_openai_needs_no_model(job, tmp_path):
    code, _ = job("--export-openai", str(tmp_path / "out" / "train.jsonl"))
    assert code == 0
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert len(lines) == len(load_seeds())
    assert set(json.loads(lines[0])) == {"prompt", "completion"}


def test_captions_looked_at_take_the_types_in_turn():
    seeds = load_seeds()[-3:]
    args = finetune_lm.arguments(["--look-captions", "2"])
    assert [task for _, task in finetune_lm.look_captions(args, seeds, True)] == ["add", "remove"]
    assert [task for _, task in finetune_lm.look_captions(args, seeds, False)] == ["", ""]
