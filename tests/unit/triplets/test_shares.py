from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p.errors import RecipeError
from ip2p.triplets.shares import CYCLE, asked_types, parse_shares, within_shares

TYPES = ("add", "remove", "style")


def test_shares_are_read_and_sum_to_one():
    assert parse_shares("", TYPES) == {}
    assert parse_shares("add=2, style=6", TYPES) == {"add": 0.25, "style": 0.75}
    assert parse_shares("even", TYPES) == {task: pytest.approx(1 / 3) for task in TYPES}


@pytest.mark.parametrize(
    ("text", "message"),
    [("add", "type=weight"), ("add=x", "type=weight"), ("add=1,ad=1", "unknown type 'ad'; known: add, remove, style"),
     ("add=0", "above 0"), ("add=-1", "above 0"), ("add=nan", "above 0"), ("add=inf", "above 0")],
)  # fmt: skip
def test_shares_that_make_no_sense_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_shares(text, TYPES)


def test_the_asked_types_have_their_shares_and_are_spread_evenly():
    cycle = asked_types(parse_shares("add=1,remove=1,style=2", TYPES))
    assert Counter(cycle) == {"add": CYCLE // 4, "remove": CYCLE // 4, "style": CYCLE // 2}
    for start in range(0, CYCLE, 20):
        assert 4 <= Counter(cycle[start : start + 20])["add"] <= 6
    assert len(asked_types(parse_shares("even", TYPES))) == CYCLE


def test_what_is_within_the_tolerance_stays_whole():
    tasks = ["add"] * 11 + ["remove"] * 9
    assert all(within_shares(tasks, {"add": 0.5, "remove": 0.5}, 0.2))


def test_of_a_type_that_came_too_often_the_first_stay():
    tasks = ["add", "remove", "add", "add", "add", "remove", "add", "add", "add", "add"] * 10
    stays = within_shares(tasks, {"add": 0.5, "remove": 0.5}, 0.2)
    kept = Counter(task for task, stay in zip(tasks, stays, strict=True) if stay)
    assert kept == {"remove": 20, "add": 30}
    places = [i for i, task in enumerate(tasks) if task == "add" and stays[i]]
    assert places == [i for i, task in enumerate(tasks) if task == "add"][:30]


def test_types_that_nobody_wants_go_and_one_that_never_came_cuts_nothing():
    assert within_shares(["add", "style", "add"], {"add": 1.0}, 0.2) == [True, False, True]
    assert within_shares(["add", "add"], {"add": 0.5, "remove": 0.5}, 0.2) == [True, True]


@given(
    counts=st.lists(st.integers(10, 80), min_size=3, max_size=3),
    weights=st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_shares_hold_within_the_tolerance_and_one_more_row_would_not_do(counts, weights):
    tasks = [task for task, count in zip(TYPES, counts, strict=True) for _ in range(count)]
    shares = {task: weight / sum(weights) for task, weight in zip(TYPES, weights, strict=True)}
    stays = within_shares(tasks, shares, 0.2)
    kept = Counter(task for task, stay in zip(tasks, stays, strict=True) if stay)
    total = sum(kept.values())
    assert total >= 10
    for task, share in shares.items():
        assert 0.8 * share * total <= kept[task] <= 1.2 * share * total
