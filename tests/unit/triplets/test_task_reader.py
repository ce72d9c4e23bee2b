"""The reader of edit types, on seed rows that it has not seen and on the postcards' own edits."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ip2p.postcards.caption_reader import read_caption, read_task
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import TASKS as POSTCARD_TASKS
from ip2p.postcards.grammar import sample_example
from ip2p.schema import Triplet
from ip2p.triplets.edit_types import edit_types
from ip2p.triplets.seed import load_seeds
from ip2p.triplets.task_reader import GOOD_PLACES, TaskReader, seed_reader
from ip2p.triplets.tasks import TASKS

FOLDS = 10
ATTRIBUTES = ("object", "colour", "ground", "sky", "style")


def places_of_the_authors_type() -> list[int]:
    seeds = load_seeds()
    folds = [(row // len(TASKS)) % FOLDS for row in range(len(seeds))]
    places = []
    for fold in range(FOLDS):
        reader = TaskReader([seed for seed, its in zip(seeds, folds, strict=True) if its != fold])
        places += [reader.ranked(seed).index(seed.task) for seed, its in zip(seeds, folds, strict=True) if its == fold]
    return places


def test_it_names_the_type_of_unseen_seeds_as_often_as_it_says():
    places = places_of_the_authors_type()
    assert np.mean([place == 0 for place in places]) == pytest.approx(0.75, abs=0.02)
    assert np.mean([place < GOOD_PLACES for place in places]) == pytest.approx(0.86, abs=0.02)


def test_a_plain_edit_is_of_one_type_and_not_of_another():
    triplet = Triplet("a dog on a bench", "add a red balloon", "a dog on a bench with a red balloon")
    assert seed_reader().ranked(triplet)[0] == "add"
    assert seed_reader().agrees(replace(triplet, task="add"))
    assert not seed_reader().agrees(replace(triplet, task="action"))


def test_open_types_refuse_what_does_not_show_and_what_was_not_asked():
    types = edit_types("open")
    good = Triplet("a dog on a bench", "add a red balloon", "a dog on a bench with a red balloon")
    assert types.labelled(good, "add") == (replace(good, task="add"), "ok")
    assert types.labelled(good, "") == (replace(good, task="add"), "ok")
    assert types.labelled(good, "action") == (replace(good, task="action"), "wrong_task")
    assert types.labelled(replace(good, edited_caption="a dog on a long bench"), "add")[1] == "inconsistent"


def test_every_caption_of_the_grammar_is_read_back():
    for place in range(300):
        rng = np.random.default_rng((7, place))
        example = sample_example(scene_of(91, place, None), rng, POSTCARD_TASKS[place % len(POSTCARD_TASKS)])
        found = read_caption(example.caption)
        assert found == {
            **{name: getattr(example.scene, name) for name in ATTRIBUTES}, "extras": frozenset(example.scene.extras)
        }  # fmt: skip


def test_every_edit_of_the_grammar_is_read_as_its_task():
    seen = Counter()
    for place in range(270):
        rng = np.random.default_rng((8, place))
        example = sample_example(scene_of(92, place, None), rng, POSTCARD_TASKS[place % len(POSTCARD_TASKS)])
        triplet = Triplet(example.caption, example.instruction, example.edited_caption)
        assert read_task(triplet) == example.task, triplet
        seen[example.task] += 1
    assert set(seen) == set(POSTCARD_TASKS)


@pytest.mark.parametrize(
    ("caption", "instruction", "edited_caption"),
    [
        ("a red boat on the sea by day", "make it night", "a red boat on the sea by day"),  # nothing changed
        ("a red boat on the sea by day", "make it night", "a blue boat on the sea by day"),  # something else
        ("a red boat on the sea by day", "make it night", "a red boat on the sea by dusk"),  # no such sky
        ("a red boat on the sea by day", "make it night", "a blue car on grass at night"),  # far too much
        ("a teapot", "make it night", "a teapot at night"),
    ],
)
def test_what_the_grammar_would_not_say_is_no_postcard_edit(caption, instruction, edited_caption):
    assert read_task(Triplet(caption, instruction, edited_caption)) is None
    assert edit_types("postcard").labelled(Triplet(caption, instruction, edited_caption), "")[1] == "inconsistent"
