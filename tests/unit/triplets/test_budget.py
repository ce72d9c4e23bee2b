import threading

import pytest

from ip2p.triplets.budget import Budget, OverBudget, Pace, Prices


def test_prices_are_for_a_million_tokens():
    assert Prices(2.0, 10.0).of(500_000, 100_000) == pytest.approx(2.0)


def test_what_could_go_over_the_cap_is_not_reserved():
    budget = Budget(cap=1.0, spent=0.4)
    budget.reserve(0.5)
    with pytest.raises(OverBudget, match=r"0.9000 of 1 are spent or reserved, and an answer may cost 0.2000"):
        budget.reserve(0.2)
    budget.settle(0.5, 0.1)
    budget.reserve(0.5)
    assert budget.spent == pytest.approx(0.5)


def test_the_cap_holds_for_many_threads():
    budget, sent = Budget(cap=10.0), []

    def ask():
        for _ in range(200):
            try:
                budget.reserve(0.5)
            except OverBudget:
                continue
            sent.append(1)
            budget.settle(0.5, 0.3)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.spent == pytest.approx(0.3 * len(sent))
    assert 9.5 < budget.spent <= 10.0


def test_what_costs_nothing_is_never_over_budget():
    budget = Budget(cap=0.0)
    budget.reserve(0.0)


class Clock:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_requests_are_spread_over_the_minute():
    clock = Clock()
    pace = Pace(30, clock.sleep, lambda: clock.now)
    began = clock.now
    for _ in range(5):
        pace.wait()
    assert clock.now - began == pytest.approx(4 * 2.0)


def test_a_pause_holds_everybody_back():
    clock = Clock()
    pace = Pace(0, clock.sleep, lambda: clock.now)
    pace.wait()
    pace.pause(7.0)
    pace.wait()
    assert clock.slept == [pytest.approx(7.0)]
    pace.wait()
    assert len(clock.slept) == 1
