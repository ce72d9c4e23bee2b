import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ip2p.config import load_recipe
from ip2p.errors import CheckpointError, RecipeError, WriterError
from ip2p.triplets.stage import WriteTriplets, clip_window


def night(caption: str) -> str:
    return f"make it night\n%%\n{caption} at night"


class ScriptedWriter:
    """Stands at the language model's place: each caption has a list of completions, one a try."""

    def __init__(self, script=None):
        self.script, self.calls = script or {}, []

    def complete(self, prompts, identities):
        self.calls.append(list(identities))
        texts = []
        for prompt, (_, attempt) in zip(prompts, identities, strict=True):
            caption = prompt.removesuffix("\n##\n")
            texts.append(self.script.get(caption, [night(caption)] * 9)[attempt])
        return texts


def batch_of(*captions, instructions=None, edited=None, indices=None) -> dict[str, np.ndarray]:
    count = len(captions)
    blank = [""] * count
    columns = {
        "prompt_id": [f"id-{caption}" for caption in captions], "caption": captions,
        "url": [f"u{i}" for i in range(count)],
        "instruction": instructions or blank, "edited_caption": edited or blank,
    }  # fmt: skip
    texts = {name: np.array(values, dtype=object) for name, values in columns.items()}
    return {"index": np.array(indices or range(count)), **texts}


def words_and_two(text: str) -> int:
    return len(text.split()) + 2


def stage(scripted=None, **changes) -> WriteTriplets:
    recipe = load_recipe("postcard")
    recipe = replace(recipe, triplets=replace(recipe.triplets, **({"text_window": 12} | changes)))
    return WriteTriplets(recipe, "cpu", writer=scripted or ScriptedWriter(), window=words_and_two)


def outcome(out) -> list[tuple[str, str]]:
    return list(zip(out["status"], out["reason"], strict=True))


def test_an_accepted_row_goes_on_with_its_texts():
    out = stage()({**batch_of("a cat"), "extra": np.array([5])})
    assert outcome(out) == [("", "ok")]
    assert (out["instruction"][0], out["edited_caption"][0]) == ("make it night", "a cat at night")
    assert (out["prompt_id"][0], out["url"][0], out["task"][0], out["error"][0]) == ("id-a cat", "u0", "", "")
    assert (out["index"][0], out["extra"][0]) == (0, 5)


def test_each_row_comes_out_once_with_its_own_reason():
    script = {
        "a dog": ["nonsense"] * 4,
        "a boat": ["x\n%%\na boat."] * 4,
        "a car": ["x\n%%\n"] * 4,
        "a tree": ["x\n%%\n" + "long " * 20] * 4,
        "a fish": [WriterError("HTTP 400 no")] * 4,
    }
    captions = ["a cat", *script, "", "word " * 20]
    out = stage(ScriptedWriter(script))(batch_of(*captions))
    assert list(out["caption"]) == captions
    assert list(out["index"]) == list(range(len(captions)))
    assert outcome(out) == [
        ("", "ok"), ("refused", "unparseable"), ("refused", "unchanged"), ("refused", "empty"), ("refused", "too_long"),
        ("error", "writer_failed"), ("refused", "bad_caption"), ("refused", "too_long"),
    ]  # fmt: skip
    assert [error for error in out["error"] if error] == ["HTTP 400 no"]
    assert [text for text in out["instruction"] if text] == ["make it night"]


def test_only_refused_rows_are_asked_again_and_each_try_has_its_own_identity():
    writer = ScriptedWriter({"a dog": ["nonsense", "x\n%%\na dog", night("a dog")]})
    out = stage(writer)(batch_of("a cat", "a dog", " "))
    assert outcome(out)[:2] == [("", "ok"), ("", "ok")]
    assert out["edited_caption"][1] == "a dog at night"
    assert writer.calls == [[("id-a cat", 0), ("id-a dog", 0)], [("id-a dog", 1)], [("id-a dog", 2)]]


def test_the_last_refusals_reason_is_kept_and_tries_are_counted():
    writer = ScriptedWriter({"a dog": ["nonsense", "x\n%%\na dog", night("a dog")]})
    assert outcome(stage(writer, tries=2)(batch_of("a dog"))) == [("refused", "unchanged")]
    assert len(writer.calls) == 2


def test_a_row_that_failed_once_and_is_then_accepted_carries_no_error():
    out = stage(ScriptedWriter({"a dog": [WriterError("HTTP 500"), night("a dog")]}))(batch_of("a dog"))
    assert outcome(out) == [("", "ok")]
    assert out["error"][0] == ""


def test_a_writer_that_cannot_go_on_stops_the_stage():
    class Gone:
        def complete(self, prompts, identities):
            raise WriterError("key refused")

    with pytest.raises(WriterError, match="key refused"):
        stage(Gone())(batch_of("a cat"))


NEAR = ["a b c d e f g h i j k l m n o p q r s t", "a b c d e f g h i j k l m n o p q r s x"]


def test_of_two_near_duplicates_the_lowest_index_wins_in_any_order_of_rows():
    big = {"text_window": 77}
    forward = stage(**big)(batch_of(*NEAR, indices=[4, 9]))
    assert outcome(forward) == [("", "ok"), ("refused", "near_duplicate")]
    assert forward["instruction"][1] == ""
    backward = stage(**big)(batch_of(*NEAR[::-1], indices=[9, 4]))
    assert outcome(backward) == [("refused", "near_duplicate"), ("", "ok")]


def test_a_near_duplicate_gets_another_try():
    writer = ScriptedWriter({NEAR[1]: [night(NEAR[1]), "make it day\n%%\na day"]})
    out = stage(writer, text_window=77)(batch_of(*NEAR))
    assert outcome(out) == [("", "ok"), ("", "ok")]
    assert out["instruction"][1] == "make it day"


def test_batches_do_not_know_of_each_other():
    both = stage(text_window=77)
    assert outcome(both(batch_of(NEAR[0]))) == [("", "ok")]
    assert outcome(both(batch_of(NEAR[1]))) == [("", "ok")]


def test_given_triplets_are_judged_once_and_kept_as_they_came():
    given = batch_of(
        "a cat", "a dog", "a boat", *NEAR,
        instructions=["make it night", "x", "", "edit", "edit"],
        edited=["a cat at night", "A dog!", "", "y", "z"],
    )  # fmt: skip
    writer = ScriptedWriter()
    out = stage(writer, writer="given", text_window=77)(given)
    assert outcome(out) == [
        ("", "ok"), ("refused", "unchanged"), ("refused", "empty"), ("", "ok"), ("refused", "near_duplicate"),
    ]  # fmt: skip
    assert list(out["instruction"]) == list(given["instruction"])
    assert writer.calls == []


def test_given_triplets_need_no_language_model():
    recipe = load_recipe("postcard", ["triplets.writer=given", "models.triplet_lm="])
    out = WriteTriplets(recipe, "cpu", window=words_and_two)(batch_of("a cat", instructions=["x"], edited=["a dog"]))
    assert outcome(out) == [("", "ok")]


def test_given_texts_are_not_used_by_a_writer_that_invents_them():
    out = stage(ScriptedWriter({"a cat": ["nonsense"] * 4}))(
        batch_of("a cat", instructions=["old"], edited=["old one"])
    )
    assert (out["instruction"][0], out["edited_caption"][0]) == ("", "")


def test_a_task_in_the_input_is_kept_and_nulls_become_empty_texts():
    batch = {**batch_of("a cat"), "task": np.array(["style"], dtype=object), "url": np.array([None], dtype=object)}
    out = stage()(batch)
    assert (out["task"][0], out["url"][0]) == ("style", "")


def test_an_empty_batch_comes_back_empty_with_all_columns():
    out = stage()(batch_of())
    assert {name: len(column) for name, column in out.items()} == dict.fromkeys(out, 0)
    assert {"index", "caption", "task", "status", "reason", "error"} <= set(out)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A text-to-image folder with a CLIP tokenizer that knows letters and the word "cat"."""
    folder = tmp_path_factory.mktemp("text_to_image")
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>"]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder


def test_the_window_counts_both_marks_and_never_truncates(clip_folder):
    count = clip_window(clip_folder / "tokenizer")
    assert count("cat") == 3
    assert count("cat cat dog") == 2 + 1 + 1 + 3
    assert count("cat " * 200) == 202


def test_a_tokenizer_that_is_cut_short_or_lacks_a_file_is_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder / "tokenizer", tmp_path / "tokenizer")
    (folder / "vocab.json").write_text((folder / "vocab.json").read_text()[:40])
    with pytest.raises(CheckpointError, match=r"tokenizer: cannot load the CLIP tokenizer .*; fetch it again"):
        clip_window(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.json missing"):
        clip_window(folder)


def test_the_recipes_own_writer_and_tokenizer_are_loaded(clip_folder, taught_lm, learnt):
    recipe = load_recipe("postcard", [
        f"models.text_to_image={clip_folder}", f"models.triplet_lm={taught_lm}", "triplets.temperature=0",
        "triplets.max_tokens=60",
    ])  # fmt: skip
    out = WriteTriplets(recipe, "cpu")(batch_of(*(triplet.caption for triplet in learnt)))
    assert list(out["instruction"]) == [triplet.instruction for triplet in learnt]
    assert list(out["edited_caption"]) == [triplet.edited_caption for triplet in learnt]
    short = replace(recipe, triplets=replace(recipe.triplets, text_window=9))
    assert "too_long" in WriteTriplets(short, "cpu")(batch_of(learnt[0].caption))["reason"]


def test_an_http_recipe_asks_its_server(clip_folder):
    recipe = load_recipe("postcard", [f"models.text_to_image={clip_folder}", "triplets.writer=http"])
    with pytest.raises(RecipeError, match=r"triplets\.http_url is empty"):
        WriteTriplets(recipe, "cpu")


def test_a_recipe_without_a_text_encoder_says_how_to_name_one(tmp_path):
    with pytest.raises(RecipeError, match=r"--set models\.text_to_image=DIR"):
        WriteTriplets(load_recipe("sd15"), "cpu")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match=r"no CLIP tokenizer here \(vocab\.json and merges\.txt missing\)"):
        clip_window(tmp_path / "tokenizer")
