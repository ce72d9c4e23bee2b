import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ip2p.config import Triplets
from ip2p.errors import CheckpointError, RecipeError
from ip2p.models.checkpoint import write_manifest
from ip2p.models.components import model_folder
from ip2p.triplets.format import STOP, completion_of, prompt_of
from ip2p.triplets.language_model import LanguageModelWriter, left_padded, next_tokens

PROMPTS = ["a cat", "a much longer caption of a boat on a lake", "x", "a dog in the snow"]
IDENTITIES = [(f"id{i}", 0) for i in range(len(PROMPTS))]


def writer(folder, seed=0, **changes) -> LanguageModelWriter:
    return LanguageModelWriter(str(folder), Triplets(**({"max_tokens": 16, "temperature": 1.0} | changes)), seed, "cpu")


@pytest.fixture(scope="module")
def random_writer(random_lm):
    return writer(random_lm)


def test_a_row_gives_the_same_text_alone_in_a_batch_and_in_any_order(random_writer):
    together = random_writer.complete(PROMPTS, IDENTITIES)
    alone = [random_writer.complete([p], [i])[0] for p, i in zip(PROMPTS, IDENTITIES, strict=True)]
    backwards = random_writer.complete(PROMPTS[::-1], IDENTITIES[::-1])[::-1]
    assert together == alone == backwards
    assert len(set(together)) == len(PROMPTS)


def test_a_second_writer_gives_the_same_texts(random_writer, random_lm):
    assert writer(random_lm).complete(PROMPTS, IDENTITIES) == random_writer.complete(PROMPTS, IDENTITIES)


def test_another_try_row_or_run_seed_gives_another_text(random_writer, random_lm):
    (first,) = random_writer.complete(["a cat"], [("id", 0)])
    assert random_writer.complete(["a cat"], [("id", 1)]) != [first]
    assert random_writer.complete(["a cat"], [("other", 0)]) != [first]
    assert writer(random_lm, seed=1).complete(["a cat"], [("id", 0)]) != [first]


def test_batches_beyond_one_call_keep_their_order(random_writer, monkeypatch):
    together = random_writer.complete(PROMPTS, IDENTITIES)
    monkeypatch.setattr("ip2p.triplets.language_model.ROWS_PER_CALL", 3)
    assert random_writer.complete(PROMPTS, IDENTITIES) == together


def test_no_prompts_give_no_texts(random_writer):
    assert random_writer.complete([], []) == []


def test_greedy_writing_gives_what_was_learnt_and_nothing_after_the_stop(taught_lm, learnt):
    greedy = writer(taught_lm, temperature=0.0, max_tokens=60)
    texts = greedy.complete([prompt_of(t.caption) for t in learnt], [("a", 0), ("b", 0)])
    assert [text + STOP for text in texts] == [completion_of(t) for t in learnt]


def test_writing_ends_with_the_last_row_and_not_at_max_tokens(taught_lm, learnt, monkeypatch):
    greedy, steps = writer(taught_lm, temperature=0.0, max_tokens=60), []
    forward = greedy._forward
    monkeypatch.setattr(greedy, "_forward", lambda *args: steps.append(1) or forward(*args))
    greedy.complete([prompt_of(learnt[0].caption)], [("a", 0)])
    expected = len(greedy.tokenizer(completion_of(learnt[0]))["input_ids"])
    assert len(steps) <= expected + 3  # the stop may be spelt in other tokens


def test_the_model_reads_new_tokens_only(random_writer, monkeypatch):
    widths, forward = [], random_writer._forward
    monkeypatch.setattr(random_writer, "_forward", lambda t, m, c: widths.append(t.shape[1]) or forward(t, m, c))
    random_writer.complete(["a cat"], [("id", 0)])
    assert widths[0] > 1
    assert set(widths[1:]) == {1}


def test_the_end_token_ends_a_row(random_lm, monkeypatch):
    ends = writer(random_lm, temperature=0.0)
    (text,) = ends.complete(["a cat"], [("id", 0)])
    first = ends.tokenizer.decode(ends.tokenizer(text)["input_ids"][:1])
    assert text.startswith(first)
    assert text != ""
    monkeypatch.setattr(ends, "ends", set(range(400)))
    assert ends.complete(["a cat"], [("id", 0)]) == [""]


def test_max_tokens_bounds_the_text(random_lm):
    for tokens in (1, 5):
        bounded = writer(random_lm, max_tokens=tokens)
        steps, forward = [], bounded._forward
        bounded._forward = lambda *args, steps=steps, forward=forward: steps.append(1) or forward(*args)
        bounded.complete(["a cat"], [("id", 0)])
        assert len(steps) <= tokens


def test_a_prompt_at_the_edge_of_the_context_is_written_as_far_as_it_fits(random_lm):
    edge = writer(random_lm, max_tokens=60)
    count = lambda text: len(edge.tokenizer(text)["input_ids"])  # noqa: E731
    long = "z" * 60
    assert count(long) == 60  # 4 tokens of room in a context of 64
    too_long = "z" * 64
    texts = edge.complete([long, too_long, "a cat"], [("l", 0), ("t", 0), ("s", 0)])
    assert texts[1] == ""
    assert 0 < count(texts[0]) <= 8
    assert texts[0] == edge.complete([long], [("l", 0)])[0]
    assert texts[2] == edge.complete(["a cat"], [("s", 0)])[0]


def test_left_padding_puts_the_real_tokens_last():
    tokens, mask = left_padded([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


LOGITS = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("uniform", "temperature", "top_p", "token"),
    [
        (0.0, 1.0, 1.0, 0), (0.0999, 1.0, 1.0, 0), (0.1001, 1.0, 1.0, 1), (0.59, 1.0, 1.0, 1), (0.61, 1.0, 1.0, 2),
        (0.9999, 1.0, 1.0, 3),
        (0.9999, 0.0, 1.0, 1),  # greedy
        (0.0, 1.0, 0.5, 1), (0.9999, 1.0, 0.5, 1),  # 0.5 is reached by one token
        (0.6, 1.0, 0.51, 1), (0.7, 1.0, 0.51, 2),  # two tokens, 2/3 and 1/3
        (0.0, 1.0, 0.0, 1),
        (0.2, 0.5, 1.0, 1), (0.03, 0.5, 1.0, 1), (0.02, 0.5, 1.0, 0),  # squares: 0.01 of 0.345 for token 0
    ],
)  # fmt: skip
def test_sampling_follows_the_cumulative_distribution(uniform, temperature, top_p, token):
    chosen = next_tokens(LOGITS, torch.tensor([uniform], dtype=torch.float64), temperature, top_p)
    assert chosen.tolist() == [token]


def test_each_row_is_sampled_with_its_own_number():
    chosen = next_tokens(LOGITS.repeat(3, 1), torch.tensor([0.05, 0.3, 0.95], dtype=torch.float64), 1.0, 1.0)
    assert chosen.tolist() == [0, 1, 3]


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target


def test_truncated_weights_are_refused_by_name(random_lm, tmp_path):
    folder = copy_of(random_lm, tmp_path / "lm")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"lm: cannot load .* whole \*\.safetensors weights; fetch it again"):
        writer(folder)


def test_missing_weights_are_refused_and_never_made_up(random_lm, tmp_path):
    folder = copy_of(random_lm, tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights missing: transformer\.h\.1\.mlp\.c_fc\.weight"):
        writer(folder)


def test_pickled_weights_are_refused(random_lm, tmp_path):
    folder = copy_of(random_lm, tmp_path / "lm")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        writer(folder)


def test_weights_that_give_nan_are_refused(random_lm, tmp_path):
    folder = copy_of(random_lm, tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        writer(folder).complete(["a cat"], [("id", 0)])


def test_a_broken_config_is_refused(random_lm, tmp_path):
    folder = copy_of(random_lm, tmp_path / "lm")
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing known"}))
    with pytest.raises(CheckpointError, match="cannot load a causal language model"):
        writer(folder)


@pytest.mark.parametrize("damage", ["absent", "cut", "lower case"])
def test_a_tokenizer_that_cannot_spell_the_format_is_refused(random_lm, tmp_path, damage):
    folder = copy_of(random_lm, tmp_path / "lm")
    file = folder / "tokenizer.json"
    if damage == "absent":
        file.unlink()
        (folder / "tokenizer_config.json").unlink()
    elif damage == "cut":
        file.write_text(file.read_text()[:500])
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(CheckpointError, match=r"cannot load a causal language model .*tokenizer"):
        writer(folder)


def test_the_embedded_model_is_verified_before_it_is_used(random_lm, tmp_path, monkeypatch):
    monkeypatch.setattr("ip2p.models.components.EMBEDDED_WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="triplet_lm"):
        model_folder("triplet_lm", "embedded")
    write_manifest(copy_of(random_lm, tmp_path / "triplet_lm"))
    assert model_folder("triplet_lm", "embedded") == tmp_path / "triplet_lm"
    write_manifest(copy_of(random_lm, tmp_path / "text_to_image"))
    data = bytearray((tmp_path / "text_to_image" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "text_to_image" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model_folder("text_to_image", "embedded")


def test_no_folder_or_a_wrong_one_is_refused_with_the_field(tmp_path):
    with pytest.raises(RecipeError, match=r"--set models\.triplet_lm=DIR"):
        model_folder("triplet_lm", "")
    with pytest.raises(CheckpointError, match=r"no such folder; correct models\.triplet_lm"):
        model_folder("triplet_lm", str(tmp_path / "none"))
    assert model_folder("triplet_lm", str(tmp_path)) == tmp_path
