"""Several models by name, and fewer in memory than there are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving import Command, Service, SlowCheck, Steps, busy, error_in, far_apart, picture_in, pixels, serving, until

from ip2p.editing.editor import Editor
from ip2p.models.components import load_edit_model

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def pair(edit_folder: Path, other_folder: Path) -> Iterator[Service]:
    """Two models, one of them in memory at a time."""
    with serving(edit_folder, models={"day": str(edit_folder), "night": str(other_folder)}, models_held=1) as made:
        yield made


@pytest.fixture(scope="module")
def expected(edit_folder: Path, other_folder: Path) -> dict[str, np.ndarray]:
    return {
        name: Editor(load_edit_model(folder, device="cpu")).edit([pixels()], ["make it night"], steps=3, seed=1)[0]
        for name, folder in (("day", edit_folder), ("night", other_folder))
    }


def loaded(service: Service) -> list[str]:
    return [served.name for served in service.engines.loaded()]


def test_each_model_edits_under_its_name_and_the_first_without_one(pair: Service, expected) -> None:
    assert far_apart(expected["day"], expected["night"]) > 20
    for name in ("day", "night", "day"):
        answer = pair.edit(model=name)
        assert far_apart(picture_in(answer), expected[name]) <= 1
        assert answer.json()["ip2p"]["model"] == name
        assert loaded(pair) == [name]
    assert far_apart(picture_in(pair.edit()), expected["day"]) <= 1


def test_a_name_that_is_not_there_is_not_found_and_loads_nothing(pair: Service) -> None:
    before = loaded(pair)
    error = error_in(pair.edit(model="dusk"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "day, night" in error["message"]
    assert loaded(pair) == before


def test_an_edit_is_finished_while_its_model_makes_room(pair: Service, expected, steps: Steps) -> None:
    with ThreadPoolExecutor(2) as people:
        first = people.submit(pair.edit, model="day")
        until(lambda: steps.asked)
        second = people.submit(pair.edit, model="night")
        until(lambda: loaded(pair) == ["night"])
        assert not first.done()
        steps.let()
        assert far_apart(picture_in(first.result(30)), expected["day"]) <= 1
        assert far_apart(picture_in(second.result(30)), expected["night"]) <= 1


def test_an_edit_that_is_being_taken_in_keeps_its_model(
    edit_folder: Path, other_folder: Path, expected, check: SlowCheck
) -> None:
    models = {"day": str(edit_folder), "night": str(other_folder)}
    with (
        serving(edit_folder, models=models, models_held=1, picture_check=check) as own,
        ThreadPoolExecutor(1) as person,
    ):
        first = person.submit(own.edit, model="day")
        assert check.looking.wait(20)
        assert own.edit(model="night").status_code == 200
        check.enough.set()
        assert far_apart(picture_in(first.result(30)), expected["day"]) <= 1


def test_two_models_that_are_loaded_at_the_same_time_are_both_whole(command: Command, expected) -> None:
    # In a process of its own: what goes wrong between two that are loaded would stay wrong in this one.
    names = ["day", "night"] * 2
    with ThreadPoolExecutor(4) as people:
        answers = list(people.map(lambda name: command.edit(model=name), names))
    for name, answer in zip(names, answers, strict=True):
        assert far_apart(picture_in(answer), expected[name]) <= 1


def test_models_are_listed_whether_they_are_in_memory_or_not(pair: Service) -> None:
    pair.edit(model="day")
    models = {one["id"]: one for one in pair.get("/v1/models").json()["data"]}
    assert list(models) == ["day", "night"]
    assert models["day"]["resolution"] == 16
    assert "resolution" not in models["night"]
    assert pair.get("/v1/models/night").json() == models["night"]


def test_a_model_that_cannot_be_loaded_harms_no_other(edit_folder: Path, tmp_path: Path) -> None:
    with serving(edit_folder, models={"good": str(edit_folder), "bad": str(tmp_path / "nowhere")}) as own:
        for _ in range(2):
            assert error_in(own.edit(model="bad"), 500)["type"] == "server_error"
        assert picture_in(own.edit(model="good")).shape == (16, 16, 3)
        assert own.get("/readyz").status_code == 200


def test_the_queue_limit_is_that_of_the_whole_server(edit_folder: Path, other_folder: Path, steps: Steps) -> None:
    models = {"day": str(edit_folder), "night": str(other_folder)}
    with (
        serving(edit_folder, models=models, queue_limit_s=1e-6) as own,
        busy(own, steps, model="day", num_inference_steps=50),
    ):
        assert error_in(own.edit(model="night", headers={"prefer": "respond-async"}), 429)["code"] == "queue_full"


def test_counts_of_a_model_do_not_fall_when_it_makes_room(pair: Service) -> None:
    pair.edit(model="day")
    before = pair.metric("ip2p_edits_total", model="day", outcome="done")
    pair.edit(model="night")
    pair.edit(model="day")
    assert pair.metric("ip2p_edits_total", model="day", outcome="done") == before + 1
