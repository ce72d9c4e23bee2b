"""Micro-batches side by side: the same training but for last bits, whoever is done first."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ip2p.training.lanes import LANE_BYTES, Lanes, lanes_for
from ip2p.training.loop import micro_batches, train, train_step
from ip2p.training.order import Order
from ip2p.training.state import start_training
from tests.unit.training.test_loop import assert_close, assert_equal


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_move_no_more_than_last_bits(undisturbed, new_unet, recipe, random_rows, schedule, lanes):
    states = [start_training(new_unet(), recipe) for _ in range(2)]
    for state in states:
        train(state, random_rows, schedule, lanes=lanes)
    assert_close(undisturbed, states[0], new_unet)
    assert_equal(*states)


def test_every_lane_has_a_micro_batch_and_none_is_larger_than_asked_for(random_rows, recipe):
    order = Order(12, 8, 7)
    sizes = {
        lanes: [len(batch.draws.timesteps) for batch in micro_batches(random_rows, order, recipe, 0, lanes=lanes)]
        for lanes in (1, 2, 3, 16)
    }
    assert sizes == {1: [4, 4], 2: [4, 4], 3: [3, 3, 2], 16: [1] * 8}


def test_losses_are_those_of_the_batches_in_order(new_unet, recipe, random_rows, schedule):
    one, two = start_training(new_unet(), recipe), start_training(new_unet(), recipe)
    batches = micro_batches(random_rows, Order(12, 8, 7), recipe, 0, lanes=3)
    with Lanes(2) as lanes:
        told = train_step(one, batches, schedule, lanes=lanes)
    plain = train_step(two, batches, schedule)
    assert torch.allclose(told.losses, plain.losses, atol=1e-6)
    assert torch.equal(told.timesteps, plain.timesteps)
    assert torch.allclose(told.grad_norm, plain.grad_norm, rtol=1e-5)


def slow_first(weight: torch.nn.Parameter, threads: set[str]):
    """Losses of 1, 10 and 100 times the weights; the first takes longest."""
    meeting = threading.Barrier(2, timeout=60)

    def losses(factor: float):
        def make() -> torch.Tensor:
            threads.add(threading.current_thread().name)
            if factor < 100:
                meeting.wait()  # fails unless two are at work at the same time
            time.sleep(0.05 if factor == 1 else 0)
            return weight.sum(dim=(1, 2, 3)) * factor

        return make

    return [losses(factor) for factor in (1.0, 10.0, 100.0)]


def test_gradients_are_added_in_the_parameters_memory_order():
    weight = torch.nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    idle = torch.nn.Parameter(torch.ones(3))
    threads: set[str] = set()
    with Lanes(2) as lanes:
        told = lanes.backward(slow_first(weight, threads), 0.5, [weight, idle])
    assert [float(values[0]) for values in told] == [12, 120, 1200]
    assert not any(values.requires_grad for values in told)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((2, 3, 2, 2), 55.5))
    assert weight.grad.stride() == weight.stride()
    assert idle.grad is None
    assert len(threads) == 2
    assert threading.current_thread().name not in threads


def test_an_error_in_a_lane_is_the_callers():
    weight = torch.nn.Parameter(torch.ones(2))

    def breaks() -> torch.Tensor:
        raise ZeroDivisionError("in a lane")

    with Lanes(2) as lanes, pytest.raises(ZeroDivisionError, match="in a lane"):
        lanes.backward([lambda: weight * 1, breaks], 1.0, [weight])


def test_the_callers_number_of_threads_stays():
    before = torch.get_num_threads()
    weight = torch.nn.Parameter(torch.ones(2))
    inside: list[int] = []

    def losses() -> torch.Tensor:
        inside.append(torch.get_num_threads())
        return weight * 1

    with Lanes(2) as lanes:
        lanes.backward([losses, losses], 1.0, [weight])
    assert inside == [1, 1]
    assert torch.get_num_threads() == before


def test_large_models_have_one_lane():
    small, large = torch.empty(8), torch.empty(LANE_BYTES // 4 + 1, device="meta")
    assert lanes_for([small], 4) == 4
    assert lanes_for([small, large], 4) == 1
