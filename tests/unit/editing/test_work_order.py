from __future__ import annotations

import dataclasses

from ip2p.editing.work_order import Waiting, chosen


def edit(number: int, rows: int = 3, left: int = 60, waited_s: float = 0.0, **more: bool) -> Waiting:
    return Waiting(number, rows, left, waited_s, **more)


def test_the_least_work_left_goes_first_and_a_call_is_filled_up() -> None:
    assert chosen([edit(0, left=300), edit(1, left=9), edit(2, left=60)], cap=6) == [1, 2]
    assert chosen([edit(0, rows=3, left=9), edit(1, rows=3, left=12), edit(2, rows=1, left=40)], cap=4) == [0, 2]


def test_waiting_makes_a_long_edit_go_before_a_short_one() -> None:
    patient = edit(0, left=300, waited_s=0.0)
    assert chosen([patient, edit(1, left=30)], cap=3) == [1]
    assert chosen([dataclasses.replace(patient, waited_s=10.0), edit(1, left=30)], cap=3) == [0]


def test_batch_edits_take_what_room_interactive_ones_leave() -> None:
    lanes = [edit(0, left=3, batch=True), edit(1, left=300), edit(2, left=300)]
    assert chosen(lanes, cap=6) == [1, 2]
    assert chosen(lanes, cap=9) == [1, 2, 0]
    assert chosen([edit(0, left=3, batch=True)], cap=9) == [0]


def test_one_edit_always_goes_however_small_the_cap() -> None:
    assert chosen([edit(0), edit(1)], cap=1) == [0]
    assert chosen([], cap=8) == []


def test_an_edit_that_asks_for_it_is_alone_in_its_calls() -> None:
    assert chosen([edit(0, left=3, alone=True), edit(1)], cap=9) == [0]
    assert chosen([edit(0, left=90, alone=True), edit(1), edit(2)], cap=9) == [1, 2]
