import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from ip2p.errors import InputError, RecipeError, TrainingError
from ip2p.schema import Triplet
from ip2p.storage import open_folder
from ip2p.triplets import fine_tuning
from ip2p.triplets.fine_tuning import Example, FineTuning
from ip2p.triplets.format import completion_of, prompt_of
from ip2p.triplets.language_model import LanguageModelWriter
from ip2p.triplets.writer_model import Manner, load_writer_model, read_manner, save_writer_model

TRIPLETS = [
    Triplet("a cat on a mat", "make it night", "a cat on a mat at night", "tone"),
    Triplet("a boat", "add a moon", "a boat under the moon", "add"),
    Triplet("a cat", "add a boat", "a cat on a boat", "add"),
    Triplet("a mat at night", "add a cat", "a cat on a mat at night", "add"),
    Triplet("a moon", "make it a boat", "a boat", "replace"),
]
RECIPE = FineTuning(
    base="x", lora_rank=0, epochs=4, batch=2, learning_rate=3e-3, held_out=1, max_tokens=64, warmup=0.1
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def begin(random_lm):
    """A new state of the tiny model under a recipe, its examples, and the tokenizer."""

    def begin(recipe=RECIPE):
        model, tokenizer = load_writer_model(random_lm, CPU)
        trained, _ = fine_tuning.split_held_out(TRIPLETS, recipe)
        state = fine_tuning.start(fine_tuning.prepare_model(model, recipe), recipe)
        return state, fine_tuning.examples_of(trained, tokenizer, recipe), tokenizer

    return begin


def weights(state):
    return {name: parameter.detach().clone() for name, parameter in state.parameters.items()}


class Killed(Exception):
    pass


def killed_at(step):
    def report(told):
        if told["step"] == step:
            raise Killed

    return report


def test_the_loss_is_on_the_completion_alone(begin):
    state, _, tokenizer = begin()
    row = Example(tokenizer("a cat")["input_ids"], tokenizer(" on a mat")["input_ids"])
    ids = torch.tensor([row.prompt + row.completion])
    logits = state.model(input_ids=ids).logits[0]
    first = len(row.prompt)
    expected = F.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
    torch.testing.assert_close(fine_tuning.summed_loss(state.model, [row]), expected)


def test_padding_changes_no_loss(begin):
    state, examples, _ = begin()
    alone = [fine_tuning.summed_loss(state.model, [example]) for example in examples]
    torch.testing.assert_close(fine_tuning.summed_loss(state.model, examples), sum(alone))


def test_micro_batches_change_no_step(begin, tmp_path):
    # Losses, not weights: where a gradient is zero but for rounding, Adam makes a step of the rounding.
    losses = []
    for size in (1, 2):
        state, examples, _ = begin()
        told = []
        fine_tuning.fine_tune(state, examples, open_folder(str(tmp_path / str(size))), told.append, micro_batch=size)
        losses.append([row["loss"] for row in told])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_killed_and_run_again_it_ends_in_the_same_weights(begin, tmp_path, rank):
    recipe = dataclasses.replace(RECIPE, lora_rank=rank)
    state, examples, _ = begin(recipe)
    fine_tuning.fine_tune(state, examples, open_folder(str(tmp_path / "whole")), lambda _: None)
    undisturbed = weights(state)
    checkpoints = open_folder(str(tmp_path / "killed"))
    for step in (3, 6):
        state, examples, _ = begin(recipe)
        fine_tuning.restore(state, checkpoints)
        with pytest.raises(Killed):
            fine_tuning.fine_tune(state, examples, checkpoints, killed_at(step), checkpoint_every_s=0)
    state, examples, _ = begin(recipe)
    fine_tuning.restore(state, checkpoints)
    assert state.step == 6
    fine_tuning.fine_tune(state, examples, checkpoints, lambda _: None)
    assert state.step == 8
    for name, weight in undisturbed.items():
        assert torch.equal(weights(state)[name], weight), name


def test_lora_trains_few_weights_and_folds_into_a_plain_model(begin, tmp_path):
    recipe = dataclasses.replace(RECIPE, lora_rank=4, learning_rate=1e-2)
    state, examples, tokenizer = begin(recipe)
    trained = sum(parameter.numel() for parameter in state.parameters.values())
    assert trained < 0.5 * sum(parameter.numel() for parameter in state.model.parameters())
    before = fine_tuning.held_out_loss(state.model, examples)
    fine_tuning.fine_tune(state, examples, open_folder(str(tmp_path / "checkpoints")), lambda _: None)
    after = fine_tuning.held_out_loss(state.model, examples)
    assert after < before - 0.1
    save_writer_model(tmp_path / "model", fine_tuning.plain_model(state.model, recipe), tokenizer, recipe.manner)
    saved, _ = load_writer_model(tmp_path / "model", CPU)
    assert fine_tuning.held_out_loss(saved, examples) == pytest.approx(after, abs=1e-4)
    assert read_manner(tmp_path / "model") == Manner("original", tasks=True)


def test_a_model_that_has_learnt_writes_what_it_was_asked_for(begin, tmp_path):
    from ip2p.config import Triplets

    recipe = dataclasses.replace(RECIPE, epochs=80, learning_rate=1e-2)
    state, examples, tokenizer = begin(recipe)
    fine_tuning.fine_tune(state, examples, open_folder(str(tmp_path)), lambda _: None)
    writer = LanguageModelWriter.around(
        state.model.eval(), tokenizer, recipe.manner, Triplets(temperature=0, max_tokens=40), 0
    )
    first = TRIPLETS[0]
    assert writer.complete([prompt_of(first.caption, first.task)], [(0,)]) == [
        completion_of(first).removesuffix("\nEND")
    ]


def test_epochs_are_reported_with_what_is_found_at_their_end(begin, tmp_path):
    state, examples, _ = begin()
    told = []
    fine_tuning.fine_tune(state, examples, open_folder(str(tmp_path)), told.append, lambda epoch: {"look": epoch})
    assert [row["look"] for row in told if "look" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in told] == list(range(1, 9))
    assert all(row["loss"] > 0 and row["tokens_per_s"] > 0 for row in told)


def test_a_loss_that_is_no_number_stops_the_run(begin, tmp_path):
    state, examples, _ = begin()
    with torch.no_grad():
        next(iter(state.parameters.values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: the loss is nan; lower --set learning_rate"):
        fine_tuning.fine_tune(state, examples, open_folder(str(tmp_path)), lambda _: None)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [
        fine_tuning.learning_rate_at(step, 100, dataclasses.replace(RECIPE, learning_rate=1.0)) for step in range(100)
    ]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11


def test_triplets_that_are_too_long_or_too_few_are_refused(begin):
    _, _, tokenizer = begin()
    with pytest.raises(InputError, match=r"has .* tokens, max_tokens is 8"):
        fine_tuning.examples_of(TRIPLETS, tokenizer, dataclasses.replace(RECIPE, max_tokens=8))
    with pytest.raises(InputError, match="5 triplets leave none to train on"):
        fine_tuning.split_held_out(TRIPLETS, dataclasses.replace(RECIPE, held_out=5))


def test_held_out_are_the_last():
    trained, held_out = fine_tuning.split_held_out(TRIPLETS, dataclasses.replace(RECIPE, held_out=2))
    assert trained == TRIPLETS[:3]
    assert held_out == TRIPLETS[3:]


def test_openai_file_in_the_originals_format():
    record, *_ = map(json.loads, fine_tuning.openai_lines(TRIPLETS, dataclasses.replace(RECIPE, tasks=0)))
    assert record == {"prompt": "a cat on a mat\n##\n", "completion": "make it night\n%%\na cat on a mat at night\nEND"}
    record, *_ = map(json.loads, fine_tuning.openai_lines(TRIPLETS, RECIPE))
    assert record["prompt"] == "a cat on a mat\n@@\ntone\n##\n"


def test_openai_file_of_a_chat():
    record, *_ = map(json.loads, fine_tuning.openai_lines(TRIPLETS, dataclasses.replace(RECIPE, prompt_format="chat")))
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][1]["content"] == "Type of edit: tone\nCaption: a cat on a mat"
    assert record["messages"][2]["content"] == completion_of(TRIPLETS[0])


def test_a_chat_model_is_taught_in_its_own_template(begin):
    _, _, tokenizer = begin()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    example = fine_tuning.examples_of(
        TRIPLETS, tokenizer, dataclasses.replace(RECIPE, prompt_format="chat", max_tokens=999)
    )[0]
    text = tokenizer.decode(example.prompt)
    assert text.endswith("<user>Type of edit: tone\nCaption: a cat on a mat<assistant>")
    assert tokenizer.decode(example.completion, skip_special_tokens=True) == completion_of(TRIPLETS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"base": ""}, "base is empty"), ({"prompt_format": "xml"}, "original or chat"), ({"epochs": 0}, "at least 1"),
     ({"lora_rank": -1}, "lora_rank"), ({"held_out": 0}, "held_out"), ({"warmup": 1.0}, "warmup")],
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        fine_tuning.check_fine_tuning(dataclasses.replace(RECIPE, **change))
