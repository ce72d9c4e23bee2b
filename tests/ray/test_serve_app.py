"""The Ray Serve application: real replicas behind Ray's own ingress, killed, replaced and multiplied under load."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests

from ip2p.editing.editor import Editor
from ip2p.errors import InputError
from ip2p.images import decode_image, encode_image
from ip2p.models.components import load_edit_model
from serve.app import WorkPolicy, app, read_arguments, settings_of
from tests.tiny_family import build_edit_model

pytestmark = [pytest.mark.ray, pytest.mark.service]
PORT = 18790
URL = f"http://127.0.0.1:{PORT}"
PICTURE = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    return {name: build_edit_model(folder / name, seed) for seed, name in enumerate(("day", "dusk"))}


@pytest.fixture(scope="module")
def deploy(ray_local: None, models: dict[str, Path]) -> Iterator[Callable[..., None]]:
    """Deploys the application, again with other arguments for an upgrade; all of it ends with the module."""
    from ray import serve

    named = ",".join(f"{name}={folder}" for name, folder in models.items())
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})

    def run(**arguments: typing.Any) -> None:
        given = {"models": named, "num_cpus": 0.5, "min_replicas": 1, "max_replicas": 1, "device": "cpu", **arguments}
        serve.run(app({name: str(value) for name, value in given.items()}), name="edits", route_prefix="/")

    try:
        yield run
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def served(deploy: Callable[..., None]) -> str:
    deploy(default_steps=3)
    return URL


def edit(headers: dict[str, str] | None = None, **fields: typing.Any) -> requests.Response:
    said = {"prompt": "make it night", "seed": "1", **{name: str(value) for name, value in fields.items()}}
    files = {"image": ("in.png", encode_image(PICTURE))}
    return requests.post(f"{URL}/v1/images/edits", data=said, files=files, headers=headers, timeout=60)


def picture_of(answer: requests.Response) -> np.ndarray:
    import base64

    assert answer.status_code == 200, answer.text
    return decode_image(base64.b64decode(answer.json()["data"][0]["b64_json"]))


def until(holds: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def replica_pids() -> set[int]:
    """Processes of this application's replicas, of this Ray alone."""
    found = set()
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, too, has ended
            if "ServeReplica:edits" in " ".join(one.cmdline()):
                found.add(one.pid)
    return found


class Clients:
    """People who go on editing and, as OpenAI's client does, try again; ``statuses`` counts every answer."""

    def __init__(self, count: int = 3):
        self.statuses: Counter[int] = Counter()
        self.given_up = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._edit_on, daemon=True) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _edit_on(self) -> None:
        while not self._stop.is_set():
            self.given_up += not any(self._tried(pause) for pause in (0.5, 1, 2, 4, 8, 16, 0))
            self._stop.wait(0.2)  # leaves a busy machine room to start replicas in

    def _tried(self, pause: float) -> bool:
        try:
            status = edit(num_inference_steps=10).status_code
        except requests.RequestException:
            status = 0
        self.statuses[status] += 1
        if status != 200:
            time.sleep(pause)
        return status == 200


@pytest.mark.timeout(300)
def test_an_edit_through_ray_serve_is_the_editors(served, models):
    answer = edit(num_inference_steps=5, guidance_scale=3, image_guidance_scale=1.5)
    alone = Editor(load_edit_model(models["day"], device="cpu")).edit(
        [PICTURE], ["make it night"], seed=1, steps=5, guidance_scale=3.0, image_guidance_scale=1.5
    )[0]
    assert np.abs(picture_of(answer).astype(int) - alone).max() <= 1
    assert answer.headers["x-request-id"]
    assert requests.get(f"{served}/readyz", timeout=10).json() == {"status": "READY"}


@pytest.mark.timeout(300)
def test_fine_tunes_are_told_apart_by_form_and_by_ray_serves_header(served):
    day, dusk = (picture_of(edit(model=name)) for name in ("day", "dusk"))
    assert not np.array_equal(day, dusk)
    assert np.array_equal(picture_of(edit({"serve_multiplexed_model_id": "dusk"})), dusk)
    refused = edit({"serve_multiplexed_model_id": "dusk"}, model="day")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


@pytest.mark.timeout(300)
def test_a_client_that_goes_away_ends_its_edit_behind_the_ingress_too(served):
    def rows() -> float:
        lines = requests.get(f"{served}/metrics", timeout=10).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("ip2p_row_evals_total"))

    before = rows()
    with pytest.raises(requests.Timeout):
        requests.post(
            f"{served}/v1/images/edits", data={"prompt": "make it night", "num_inference_steps": "100", "n": "8"},
            files={"image": ("in.png", encode_image(PICTURE))}, timeout=0.3,
        )  # fmt: skip

    def quiet() -> bool:
        one = rows()
        time.sleep(0.5)
        return rows() == one

    until(quiet)
    assert rows() - before < 8 * 100 * 3 / 2


@pytest.mark.timeout(600)
def test_any_replica_answers_for_a_background_edit(deploy):
    deploy(default_steps=3, min_replicas=2, max_replicas=2)
    until(lambda: len(replica_pids()) == 2)
    place = edit({"prefer": "respond-async"}).headers["location"]
    states = []

    def ended() -> bool:
        states.append(requests.get(URL + place, timeout=10).json())
        return states[-1]["status"] == "completed"

    until(ended)
    contents = {requests.get(URL + states[-1]["content"][0], timeout=10).content for _ in range(8)}
    assert len(contents) == 1
    assert np.array_equal(decode_image(contents.pop()), picture_of(edit()))


@pytest.mark.timeout(600)
def test_a_replica_killed_under_load_costs_a_retry_and_is_replaced(deploy):
    deploy(default_steps=3, min_replicas=2, max_replicas=2)
    until(lambda: len(replica_pids()) == 2)
    with Clients() as clients:
        until(lambda: clients.statuses[200] >= 6)
        victim = min(replica_pids())
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in replica_pids() and len(replica_pids()) == 2)
        after = clients.statuses[200]
        until(lambda: clients.statuses[200] >= after + 6)
    assert clients.given_up == 0
    assert set(clients.statuses) <= {200, 0, 500, 502, 503}, clients.statuses


@pytest.mark.timeout(600)
def test_an_upgrade_under_load_loses_nothing_for_a_client_that_retries(deploy):
    deploy(default_steps=3, min_replicas=2, max_replicas=2)
    with Clients() as clients:
        until(lambda: clients.statuses[200] >= 6)
        deploy(default_steps=4, min_replicas=2, max_replicas=2)
        after = clients.statuses[200]
        until(lambda: clients.statuses[200] >= after + 6)
    assert clients.given_up == 0
    limits = requests.get(f"{URL}/v1/models/day", timeout=10).json()["limits"]
    assert limits["default_steps"] == 4


@pytest.mark.parametrize(
    ("waiting", "requests_there", "expected"),
    [([], 0, 0), ([], 3, 1), ([0.1], 1, 1), ([5.0, 3.0], 9, 4), ([1.0, 1.0], 2, 1)],
)
def test_replicas_follow_the_seconds_of_work(waiting, requests_there, expected):
    told = {str(place): value for place, value in enumerate(waiting)}
    context = SimpleNamespace(aggregated_metrics={"queued_s": told}, total_num_requests=requests_there)
    assert WorkPolicy(target_s=2.0)(typing.cast(typing.Any, context))[0] == expected


def test_a_slip_in_the_arguments_is_told_before_anything_is_deployed():
    with pytest.raises(InputError, match="unknown argument 'replicas'; known: models, min_replicas"):
        app({"replicas": "3"})
    with pytest.raises(InputError, match="max_replicas=many: expected int"):
        app({"max_replicas": "many"})
    with pytest.raises(InputError, match="expected NAME=DIR"):
        app({"models": "night"})
    chosen = settings_of(read_arguments({"models": "a=/x,b=/y", "max_steps": "7", "queue_limit_s": 3}))
    assert (dict(chosen.models), chosen.max_steps, chosen.queue_limit_s) == ({"a": "/x", "b": "/y"}, 7, 3.0)
