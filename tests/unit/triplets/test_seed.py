import json
import tomllib
from pathlib import Path

import pytest

from ip2p.errors import InputError, StorageError
from ip2p.schema import Triplet
from ip2p.triplets.seed import (
    MAX_INSTRUCTION_USES,
    PROBLEM_KINDS,
    SEED_FILE,
    TASKS,
    find_problems,
    load_seeds,
    main,
    published_clip_window,
    task_counts,
)

PART = 4 * len(TASKS)
"""The types take turns in the file, so its first rows hold as many of each."""


def words_and_two(text: str) -> int:
    return len(text.split()) + 2


def first_rows(count: int = PART) -> list[dict[str, object]]:
    with SEED_FILE.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def written(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def row_of(caption: str, instruction: str, edited_caption: str, task: str) -> dict[str, object]:
    return {"caption": caption, "instruction": instruction, "edited_caption": edited_caption, "task": task}


def line_of(task: str) -> int:
    return next(line for line, row in enumerate(first_rows(), start=1) if row["task"] == task)


def kinds_with(path: Path, row: object, task: str = "add") -> set[str]:
    """What is found in a clean part of the seeds once ``row`` stands in place of the first row of ``task``."""
    rows: list[object] = list(first_rows())
    rows[line_of(task) - 1] = row
    found = find_problems(written(path / "seeds.jsonl", rows), words_and_two)
    assert {problem.line for problem in found} <= {0, line_of(task)}
    assert all(problem.message for problem in found)
    return {problem.kind for problem in found}


def test_there_are_at_least_700_seeds_and_no_type_is_rare_or_common():
    seeds = load_seeds()
    counts = task_counts(seeds)
    assert sum(counts.values()) == len(seeds) >= 700
    assert {task: count for task, count in counts.items() if not 60 <= count <= 90} == {}


def test_the_checker_finds_nothing_wrong_with_the_shipped_seeds():
    assert find_problems(window=published_clip_window()) == []


def test_the_published_window_counts_both_ends():
    assert published_clip_window()("a cat") == 4


def test_the_seeds_travel_with_the_package():
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert SEED_FILE.name in pyproject["tool"]["setuptools"]["package-data"]["ip2p.triplets"]


def test_a_part_of_the_seeds_in_which_the_types_are_even_is_clean(tmp_path):
    assert find_problems(written(tmp_path / "seeds.jsonl", first_rows()), words_and_two) == []


PLANTED = {
    "unreadable": '{"caption": "a cat"',
    "fields": {"caption": "a cat in a box", "instruction": "add a hat", "edited_caption": "a cat with a hat in a box"},
    "untidy": row_of("a cat  in a box", "add a hat", "a cat with a hat in a box", "add"),
    "task": row_of("a cat in a box", "add a hat", "a cat with a hat in a box", "adding"),
    "unparseable": row_of("a cat in a box", "add a hat\n%%\n", "a cat with a hat in a box", "add"),
    "empty": row_of("a cat in a box", "\u200b", "a cat with a hat in a box", "add"),
    "unchanged": row_of("a cat in a box", "add a hat", "A cat in a box.", "add"),
    "too_long": row_of("a cat" + " in a box" * 25, "add a hat", "a cat with a hat", "add"),
    "not_shown": row_of("a cat in a box", "add a hat", "a cat with a scarf in a box", "add"),
    "rewritten": row_of("seven ripe figs, marble slab, noon", "add a wasp", "a wasp", "add"),
    "unasked": row_of("a cat in a box", "add a hat", "an old tired spotted cat with a hat in a box", "add"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_defect_is_found_on_its_line(kind, tmp_path):
    found = kinds_with(tmp_path, PLANTED[kind])
    found.discard("share")  # a row that cannot be used is missing from its type, too
    assert found == ({kind, "untidy"} if kind == "unparseable" else {kind})  # delimiters hold line breaks


def test_every_kind_of_problem_is_planted_somewhere():
    between_rows = {"caption_again", "similar_caption", "instruction_again", "near_duplicate", "share"}
    assert set(PLANTED) | between_rows == set(PROBLEM_KINDS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "a"}, "no instruction"),
        ({**row_of("a", "b", "c", "add"), "task": None}, "task is not text"),
        ({**row_of("a", "b", "c", "add"), "url": "x"}, "unknown field 'url'"),
        ("[]", "not a JSON object but list"),
    ],
)
def test_a_row_that_is_not_a_triplet_is_named_with_its_line(row, message, tmp_path):
    path = written(tmp_path / "seeds.jsonl", [*first_rows(2), row])
    assert [(p.line, p.message) for p in find_problems(path) if p.line] == [(3, message)]
    with pytest.raises(InputError, match=f"line 3: {message}"):
        load_seeds(path)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (row_of("a fox with a drum by a mill", "remove the drum", "a fox by a mill", "remove"), set()),
        (row_of("a fox with a drum by a mill", "remove the drum", "a drum by a mill", "remove"), {"not_shown"}),
        (row_of("a fox with a drum by a mill", "lose the cart", "a fox by a mill", "remove"), {"not_shown"}),
    ],
)
def test_what_is_removed_must_have_been_there_and_be_gone(row, found, tmp_path):
    assert kinds_with(tmp_path, row, "remove") == found


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"remove", "count"}))
def test_what_an_instruction_names_must_be_new_in_the_edited_caption(task, tmp_path):
    row = row_of("a fox by a mill", "let there be fog on the fox", "a fox by a mill at dusk", task)
    assert kinds_with(tmp_path, row, task) == {"not_shown"}
    row["edited_caption"] = "a foggy fox by a mill"
    assert kinds_with(tmp_path, row, task) == set()


def test_a_count_need_not_be_named(tmp_path):
    assert kinds_with(tmp_path, row_of("a fox by a mill", "one more", "two foxes by a mill", "count"), "count") == set()


@pytest.mark.parametrize(
    ("instruction", "edited_caption", "found"),
    [
        ('change "Left" to "Right"', 'a sign: "Right"', set()),
        ('change "Left" to "Right"', 'a sign: "right"', {"not_shown"}),
        ('change "Left" to "Straight on"', 'a sign: "Straight ahead"', {"not_shown"}),
        ('change "Left" to "Right"', 'a right sign: "Left"', {"not_shown"}),
    ],
)
def test_quoted_words_must_be_readable_letter_for_letter(instruction, edited_caption, found, tmp_path):
    assert kinds_with(tmp_path, row_of('a sign: "Left"', instruction, edited_caption, "text"), "text") == found


@pytest.mark.parametrize(
    ("edited_caption", "found"),
    [("a wasp, figs, noon", set()), ("a wasp, noon", {"rewritten"})],
)
def test_a_quarter_of_the_caption_must_be_left(edited_caption, found, tmp_path):
    row = row_of("seven ripe figs, marble slab, brass scale, noon", "add a wasp", edited_caption, "add")
    assert kinds_with(tmp_path, row) == found


@pytest.mark.parametrize(("extra", "found"), [("old tired", set()), ("old tired spotted", {"unasked"})])
def test_two_words_more_than_asked_are_let_through_and_three_are_not(extra, found, tmp_path):
    assert kinds_with(tmp_path, row_of("a cat in a box", "add a hat", f"an {extra} cat, hat, box", "add")) == found


@pytest.mark.parametrize(
    ("asked", "shown"),
    [("run", "running"), ("snow", "snowy"), ("ride", "riding"), ("raise", "raised"), ("cherry", "cherries"),
     ("parry", "parrying"), ("glasses", "glass"), ("horses", "horse")],
)  # fmt: skip
def test_words_meet_whatever_their_ending(asked, shown, tmp_path):
    row = row_of("a man on a hill", f"let us see {asked} there", f"a man {shown} on a hill", "action")
    assert kinds_with(tmp_path, row, "action") == set()


def test_a_caption_that_comes_again_is_found_whatever_its_case(tmp_path):
    row = {**first_rows(1)[0], "instruction": "add a scarecrow", "edited_caption": "Old stone bridge and a scarecrow"}
    row["caption"] = str(row["caption"]).upper() + "!"
    assert kinds_with(tmp_path, row, "remove") - {"share", "not_shown"} == {"caption_again"}


def test_the_same_words_in_another_order_are_a_similar_caption(tmp_path):
    words = str(first_rows(1)[0]["caption"]).replace(",", "").split()
    caption = " ".join(reversed(words))
    row = row_of(caption, "replace the bridge with a ford", caption.replace("bridge", "ford"), "replace")
    assert kinds_with(tmp_path, row, "replace") == {"similar_caption"}


@pytest.mark.parametrize(("shared", "found"), [(7, {"similar_caption"}), (6, set())])
def test_captions_are_similar_from_seven_words_in_ten(shared, found, tmp_path):
    common = [f"figure{i}" for i in range(shared)]
    own = [f"ground{i}" for i in range(10 - shared)]
    rows: list[object] = list(first_rows())
    rows[0] = row_of(" ".join(common), "add a wasp", " ".join([*common, "wasp"]), "add")
    rows[10] = row_of(" ".join(common + own), "add a moth", " ".join([*common, *own, "moth"]), "add")
    problems = find_problems(written(tmp_path / "seeds.jsonl", rows))
    assert {(problem.line, problem.kind) for problem in problems} == {(11, kind) for kind in found}


def test_an_instruction_may_be_used_three_times_but_not_four(tmp_path):
    rows: list[object] = list(first_rows())
    animals = ["a heron in a ditch", "two eels, engraving", "Mule at the forge", "tin whale on wheels"]
    for place, animal in enumerate(animals):
        rows[10 * place] = row_of(animal, "Add a hat!"[: 10 - place % 2], f"{animal}, hat", "add")
    found = find_problems(written(tmp_path / "seeds.jsonl", rows))
    assert [(problem.line, problem.kind) for problem in found] == [(10 * MAX_INSTRUCTION_USES + 1, "instruction_again")]


def test_the_same_edit_of_the_same_caption_is_a_near_duplicate(tmp_path):
    rows: list[object] = list(first_rows())
    rows[10] = {**rows[0], "caption": str(rows[0]["caption"]).lower()}
    found = find_problems(written(tmp_path / "seeds.jsonl", rows))
    assert {(problem.line, problem.kind) for problem in found} == {(11, "caption_again"), (11, "near_duplicate")}


def test_a_type_may_be_a_fifth_off_its_even_share(tmp_path):
    rows = first_rows(20 * len(TASKS))
    of_text = [row for row in rows if row["task"] == "text"]
    others = [row for row in rows if row["task"] != "text"]
    for left_out, found in [(4, set()), (5, {(0, "share")})]:
        # A row of another type stands in for each one left out, so that the even share stays 20.
        spare = [row for row in first_rows(25 * len(TASKS))[len(rows) :] if row["task"] != "text"][:left_out]
        path = written(tmp_path / "seeds.jsonl", others + spare + of_text[left_out:])
        assert {(problem.line, problem.kind) for problem in find_problems(path)} == found


def test_lengths_are_left_alone_without_a_window(tmp_path):
    caption = "a cat " + " ".join(f"box{i}" for i in range(90))
    path = written(tmp_path / "seeds.jsonl", [row_of(caption, "add a hat", f"{caption} hat", "add")])
    assert {problem.kind for problem in find_problems(path)} == {"share"}
    assert {problem.kind for problem in find_problems(path, words_and_two)} == {"share", "too_long"}


def test_loading_keeps_the_order_and_all_four_texts(tmp_path):
    rows = [row_of("b", "add c", "b, c", "add"), row_of("a", "add c", "a, c", "style")]
    assert load_seeds(written(tmp_path / "seeds.jsonl", rows)) == [
        Triplet("b", "add c", "b, c", "add"), Triplet("a", "add c", "a, c", "style"),
    ]  # fmt: skip


def test_an_empty_or_absent_file_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="empty"):
        load_seeds(written(tmp_path / "seeds.jsonl", []))
    with pytest.raises(StorageError):
        load_seeds(str(tmp_path / "none.jsonl"))


def test_the_command_counts_and_answers_1_where_something_is_wrong(tmp_path):
    said: list[str] = []
    assert main([written(tmp_path / "good.jsonl", first_rows())], said.append) == 0
    assert said == [f"{PART} triplets: " + ", ".join(f"4 {task}" for task in TASKS)]
    said.clear()
    assert main([written(tmp_path / "bad.jsonl", [*first_rows(), "{"])], said.append) == 1
    assert said[0].startswith("line 41: unreadable: ")
