"""What the shipped writer writes for held-out postcards, read exactly by the grammar (numbers: docs/triplets.md)."""

from collections import Counter

import pytest

from ip2p.config import load_recipe
from ip2p.postcards.captions import postcard_captions
from ip2p.postcards.grammar import TASKS
from ip2p.triplets.assembly import language_model_stage
from ip2p.triplets.shares import parse_shares, within_shares
from ip2p.triplets.writing import Writing, WritingRun

pytestmark = pytest.mark.weights

CAPTIONS = 600


@pytest.fixture(scope="module")
def rows():
    run = WritingRun(load_recipe("postcard", ["triplets.temperature=1.0"]), Writing(types="postcard", shares="even"))
    return language_model_stage(run, "cpu")(postcard_captions(CAPTIONS, 3, held_out=True).rows)


def test_nearly_all_held_out_captions_get_a_valid_triplet(rows):
    assert sum(row["status"] == "accepted" for row in rows) >= 0.97 * CAPTIONS


def test_one_try_is_valid_as_often_as_the_documentation_says(rows):
    assert sum(row["refusals"] == "{}" for row in rows) / CAPTIONS == pytest.approx(0.815, abs=0.03)


def test_all_types_come_in_even_shares(rows):
    tasks = [row["task"] for row in rows if row["status"] == "accepted"]
    shares = parse_shares("even", TASKS)
    stays = within_shares(tasks, shares, 0.2)
    kept = Counter(task for task, stay in zip(tasks, stays, strict=True) if stay)
    total = sum(kept.values())
    assert total >= 0.9 * CAPTIONS
    for task, share in shares.items():
        assert 0.8 <= kept[task] / total / share <= 1.2, task
