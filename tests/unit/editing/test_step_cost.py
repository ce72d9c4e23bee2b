from __future__ import annotations

import pytest

from ip2p.editing.step_cost import StepCost

HEAVY = {1: 0.010, 2: 0.011, 4: 0.013, 8: 0.020, 16: 0.038, 32: 0.076}


def test_the_knee_is_where_more_rows_stop_paying() -> None:
    assert StepCost(HEAVY).knee() == 8  # 400 rows a second; the best is 421
    assert StepCost({1: 1.0, 2: 2.0, 4: 4.0}).knee() == 1
    assert StepCost({1: 1.0, 2: 1.0, 4: 1.0}).knee() == 4


def test_the_knee_may_be_kept_below_what_memory_has_room_for() -> None:
    assert StepCost(HEAVY).knee(at_most=4) == 4
    assert StepCost({8: 0.1}).knee(at_most=4) == 8  # the only size there is


def test_seconds_between_and_beyond_the_measured_sizes() -> None:
    cost = StepCost(HEAVY)
    assert cost.of_call(8) == 0.020
    assert cost.of_call(3) == pytest.approx(0.012)
    assert cost.of_call(64) == pytest.approx(0.152)
    assert StepCost({4: 0.1}).of_call(1) == 0.1
    assert cost.of_work(64, per_call=32) == pytest.approx(2 * cost.of_call(32))
    assert cost.of_work(6, per_call=3) == pytest.approx(2 * 0.012)


def test_calls_that_are_run_correct_the_table_little_by_little() -> None:
    cost = StepCost(HEAVY)
    for _ in range(60):
        cost.note(8, 0.040)
    assert cost.of_call(8) == pytest.approx(0.040, rel=0.01)
    assert cost.of_call(32) == 0.076
    cost.note(9, 0.045)  # as of 8 rows: 0.040
    assert cost.of_call(8) == pytest.approx(0.040, rel=0.01)


@pytest.mark.parametrize("measured", [{}, {0: 1.0}, {1: 0.0}])
def test_a_table_of_nothing_is_refused(measured: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="calls of at least one row"):
        StepCost(measured)
