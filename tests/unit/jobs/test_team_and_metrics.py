"""How many workers a training takes, and how their numbers become one."""

from __future__ import annotations

import math
import typing

import numpy as np
import pytest

from ip2p.errors import InputError
from ip2p.storage import LocalFolder
from ip2p.training.recipe import load_training_recipe
from jobs import _trackers
from jobs._ray_train import Team, check_same_step, mean_of_shares, team_of, threads_of


@pytest.fixture
def cluster(monkeypatch):
    """Sets what the cluster has, and whether it is one of somebody else's, which may grow."""

    def has(address: str = "", *more: dict[str, float], **resources: float) -> None:
        nodes = [{"Alive": True, "Resources": node} for node in (resources, *more)]
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        monkeypatch.setattr("ray.nodes", lambda: [*nodes, gone])
        monkeypatch.setenv("RAY_ADDRESS", address)

    return has


def test_a_worker_a_gpu_or_one_on_the_cores_that_are_left(cluster):
    cluster(CPU=16, GPU=8)
    assert (team_of(None, None).workers, team_of(None, None).gpus) == ((8, 8), 1.0)
    assert team_of(None, 2).workers == (4, 4)
    assert team_of(None, 0.5).workers == (16, 16)
    cluster(CPU=4)
    assert (team_of(None, None).workers, team_of(None, None).cpus) == ((1, 1), 3.5)
    assert team_of((2, 2), None).cpus == 1.75


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (0.75, 1), (1.17, 1), (1.5, 2), (1.75, 2), (7.75, 8)])
def test_a_cpu_worker_has_a_thread_for_each_core_that_its_share_is_cut_from(cpus, threads):
    assert threads_of(Team((1, 1), 0.0, cpus, 8)) == threads


def test_a_worker_on_cpus_asks_for_no_more_than_one_node_has(cluster):
    cluster("10.0.0.1:6379", {"CPU": 2}, {"CPU": 2}, CPU=2)
    assert (team_of(None, None).cpus, team_of(None, None).cores) == (1.5, 6)
    cluster("10.0.0.1:6379", {"CPU": 8}, CPU=8)
    assert team_of((3, 3), None).cpus == 3.75  # two on one node, one on the other
    cluster("10.0.0.1:6379", {"CPU": 1}, {"CPU": 1}, CPU=0)
    assert team_of((2, 2), None).cpus == 0.5
    cluster("10.0.0.1:6379", {"CPU": 16}, CPU=4)
    assert team_of((2, 2), None).cpus == 7.75  # both on the large one
    cluster("10.0.0.1:6379", CPU=0)
    assert team_of((2, 2), None).cpus == 0.5  # on nodes that are still to come


def test_what_does_not_fit_is_said_where_nothing_can_grow(cluster):
    cluster(CPU=2)
    with pytest.raises(InputError, match=r"5 workers of 0\.5 CPU each do not fit on 2 CPU cores; use fewer --workers"):
        team_of((5, 5), None)
    assert team_of((1, 5), None).workers == (1, 5)
    cluster(CPU=8, GPU=2)
    with pytest.raises(InputError, match="3 workers of 1 GPU each do not fit on 2 GPUs"):
        team_of((3, 3), None)
    cluster("10.0.0.1:6379", CPU=2)
    assert team_of((5, 5), None).workers == (5, 5)


def test_gpus_that_are_not_there(cluster):
    cluster(CPU=2)
    with pytest.raises(InputError, match="--gpus-per-worker asks for GPUs, but this cluster has none"):
        team_of(None, 1)


def test_losses_of_unequal_shares_are_weighed_by_their_samples():
    found = mean_of_shares([([1.0, math.nan, 4.0], [3, 0, 1]), ([5.0, math.nan, math.nan], [1, 0, 0])])
    assert found["loss"] == pytest.approx((3 * 1 + 4 + 5) / 5)
    assert found["loss_by_band"][::2] == [2.0, 4.0]
    assert math.isnan(found["loss_by_band"][1])
    assert found["samples_by_band"] == [4, 0, 1]


def test_workers_that_found_different_checkpoints_do_not_train_together(monkeypatch):
    def gather(into: list[int], mine: int) -> None:
        into[:] = [mine, 0]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    check_same_step(0, 2)
    check_same_step(40, 1)
    with pytest.raises(InputError, match=r"different steps \(40, 0\): --output must be on storage"):
        check_same_step(40, 2)


class Tracker:
    """One that takes numbers, and pictures only in the subclass."""

    name = "ours"

    def __init__(self):
        self.numbers: dict[int, dict[str, float]] = {}

    def store_init_configuration(self, values: dict[str, typing.Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.numbers[step] = values

    def finish(self) -> None:
        self.finished = True


class PictureTracker(Tracker):
    def log_images(self, pictures: dict[str, np.ndarray], step: int) -> None:
        self.pictures = (step, {name: picture.shape for name, picture in pictures.items()})


@pytest.mark.parametrize("kind", [Tracker, PictureTracker])
def test_trackers_get_numbers_by_chart_and_pictures_where_they_take_them(kind, monkeypatch, tmp_path):
    from ip2p.images import encode_image

    tracker = kind()
    monkeypatch.setattr(_trackers, "_tracker", lambda name, folder: tracker)
    LocalFolder(tmp_path).write("grids/a.png", encode_image(np.zeros((4, 6, 3), np.uint8)))
    row = {"step": 50, "loss": 0.5, "loss_by_band": [0.1, math.nan], "grid": "grids/a.png", "held_out_loss": None}
    with _trackers.Trackers("tensorboard", LocalFolder(tmp_path), load_training_recipe("postcard", ())) as trackers:
        trackers.log(row)
    assert tracker.numbers == {50: {"loss": 0.5, "loss_by_timestep/000-499": 0.1}}
    assert tracker.settings["name"] == "postcard"
    assert tracker.finished
    if kind is PictureTracker:
        assert tracker.pictures == (50, {"edits": (1, 4, 6, 3)})
