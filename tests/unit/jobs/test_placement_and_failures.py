"""Pools before their nodes are there, and how many shards may fail in which way before a job stops."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import ray

from ip2p.errors import InputError, JobError
from jobs import datagen
from jobs._ray import FAILURES_IN_A_ROW, FailedShard, default_placement, good_shards, losses_allowed, waits_for

ROOT = Path(__file__).parents[3]
SHIPPED = {"painter_actors": (1, 16), "painter_gpus": 0.8, "lm_actors": (1, 4), "lm_gpus": 0.2}


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that was joined and has these resources in sight."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    def has(**resources: float) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)

    return has


def test_pools_on_gpus_wait_for_nodes_where_their_sizes_are_given(cluster):
    cluster(memory=1e9)  # a head that does no work, and no node
    placement = default_placement(**SHIPPED)
    assert (placement.painter_actors, placement.painter_gpus) == ((1, 16), 0.8)
    assert (placement.lm_actors, placement.lm_gpus) == ((1, 4), 0.2)
    assert "waiting for nodes" in waits_for(placement)
    cluster(CPU=96.0, GPU=8.0)
    assert default_placement(**SHIPPED) == placement, "what a painter takes does not depend on who came first"
    assert waits_for(placement) == ""


def test_the_command_for_a100s_can_begin_without_one(cluster):
    cluster(memory=1e9)
    lines = (ROOT / "k8s/overlays/a100/settings.env").read_text().splitlines()
    (words,) = [line.partition("=")[2] for line in lines if line.startswith("IP2P_DATAGEN=")]
    placement = default_placement(**datagen._asked(datagen.arguments(shlex.split(words))))
    assert (placement.painter_gpus, placement.lm_gpus) == (0.8, 0.2)


@pytest.mark.parametrize(("size", "flags"), [("painter_actors", ("--painter-gpus", "--painters")),
                                             ("lm_actors", ("--writer-gpus", "--writers"))])  # fmt: skip
def test_a_pool_on_gpus_that_are_not_there_needs_a_size(cluster, size, flags):
    cluster(CPU=4.0)
    with pytest.raises(InputError, match=f"^{flags[0]} asks for GPUs.*{flags[1]} MIN:MAX"):
        default_placement(**{name: value for name, value in SHIPPED.items() if name != size})


def test_painters_alone_may_wait_for_gpus(cluster):
    cluster(CPU=4.0)
    placement = default_placement(painter_actors=(1, 64), painter_gpus=0.8)
    assert (placement.painter_gpus, placement.lm_gpus, placement.lm_actors) == (0.8, 0, (1, 1))


def test_this_machine_gets_no_gpus_by_waiting(cluster, monkeypatch):
    cluster(CPU=4.0)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(InputError, match="this machine has none"):
        default_placement(**SHIPPED)


def test_without_gpus_there_is_a_painter_a_core_and_nothing_to_wait_for(cluster):
    cluster(CPU=4.0)
    for asked in ({}, {"painter_gpus": 0.0, "lm_gpus": 0.0}):
        placement = default_placement(**asked)
        assert (placement.painter_actors, placement.painter_cpus, placement.threads) == ((1, 4), 0.875, 1)
        assert waits_for(placement) == ""


def test_gpus_in_sight_are_shared_by_painters_and_writers(cluster):
    cluster(CPU=96.0, GPU=8.0)
    placement = default_placement()
    assert (placement.painter_actors, placement.lm_actors) == ((1, 8), (1, 8))
    assert (placement.painter_gpus, placement.lm_gpus) == (0.8, 0.2)


# ---- shards that fail


def lost(number: int) -> FailedShard:
    return FailedShard(f"lost-{number}", "its worker died 4 times", worker_died=True)


def bug(number: int) -> FailedShard:
    return FailedShard(f"bug-{number}", "ZeroDivisionError")


def test_shards_whose_workers_died_come_together_and_stop_nothing():
    window = map(lost, range(FAILURES_IN_A_ROW + 2))
    came = good_shards(["a", *window, "b", "c"], lambda text: None)
    assert list(itertools.islice(came, 3)) == ["a", "b", "c"]
    with pytest.raises(JobError, match=r"^7 shards failed, the first of them lost-0: "):
        next(came)


def test_bugs_in_a_row_stop_the_job_whatever_died_between_them():
    finished = iter([*map(bug, range(FAILURES_IN_A_ROW - 1)), lost(0), bug(9), "after"])
    said: list[str] = []
    with pytest.raises(JobError, match=r"^6 shards failed"):
        list(good_shards(finished, said.append))
    assert said[-1] == "error: shard bug-9: ZeroDivisionError"
    assert next(finished) == "after", "it went on"


def test_a_good_shard_ends_the_row():
    few = FAILURES_IN_A_ROW - 1
    finished = [*map(bug, range(few)), "good", *map(bug, range(few)), "last"]
    with pytest.raises(JobError, match=rf"^{2 * few} shards failed"):
        list(good_shards(finished, lambda text: None))


@pytest.mark.parametrize(("shards", "allowed"), [(1, 5), (100, 5), (1000, 10), (4096, 40)])
def test_a_window_may_lose_a_small_share_of_its_shards(shards, allowed):
    assert losses_allowed(shards) == allowed
