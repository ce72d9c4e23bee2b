"""The edits of a batch at the project's own server: the engine's results, behind people, through its refusals."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving import FixedCost, Service, Steps, busy, far_apart, pixels, serving, until

from ip2p.batch.editing import ServerEditing
from ip2p.editing.edit_request import EditRequest
from ip2p.editing.engine import EditEngine
from ip2p.editing.step_cost import StepCost
from ip2p.errors import InputError, StorageError
from serve.settings import key_digest

pytestmark = pytest.mark.service

MASK = np.zeros((16, 16), np.uint8)
MASK[:, 8:] = 255
REQUEST = EditRequest(image=pixels(3), instruction="make it night", steps=3, seed=7, batch=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 3.0, "image_guidance_scale": 1.0, "negative_prompt": "day", "sampler": "dpmpp_2m"},
        {"mask": MASK},
        {"size": (32, 16)},
        {"resolution": 32, "restore_size": True, "image": pixels(4, 24, 20)},
    ],
)
def test_the_servers_edit_is_that_of_the_engine_to_one_level(service: Service, edit_model, changes) -> None:
    request = dataclasses.replace(REQUEST, **changes)
    with EditEngine(edit_model, StepCost({1: 0.01})) as engine:
        wanted = engine.submit(request).future.result(60)
    assert far_apart(ServerEditing(service.url).edit(request), wanted) <= 1


def test_edits_of_a_batch_are_in_the_lane_that_gives_way(service: Service) -> None:
    before = service.metric("ip2p_edit_seconds_count", lane="batch")
    ServerEditing(service.url).edit(REQUEST)
    until(lambda: service.metric("ip2p_edit_seconds_count", lane="batch") == before + 1, "the edit is counted")


def test_what_the_server_refuses_is_the_requests_own_fault(service: Service) -> None:
    with pytest.raises(InputError, match="size must be of at most 4096 pixels"):
        ServerEditing(service.url).edit(dataclasses.replace(REQUEST, size=(128, 64)))


def test_a_server_with_keys_wants_one_of_them(edit_folder: Path) -> None:
    with serving(edit_folder, key="sesame", key_digests=frozenset([key_digest("sesame")])) as service:
        for key in ("", "wrong"):
            with pytest.raises(StorageError, match="set IP2P_API_KEY") as caught:
                ServerEditing(service.url, key).edit(REQUEST)
            assert caught.value.kind == "refused"
        assert ServerEditing(service.url, "sesame").edit(REQUEST).shape == (16, 16, 3)


def test_a_server_whose_queue_is_full_is_asked_until_it_has_room(
    edit_folder: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(edit_folder, queue_limit_s=1e-6) as service, ThreadPoolExecutor(1) as batch:
        monkeypatch.setattr(service.engine(), "cost", FixedCost())
        with busy(service, steps):
            edited = batch.submit(ServerEditing(service.url).edit, REQUEST)
            until(lambda: service.metric("ip2p_requests_total", status="429"), "the batch was sent away")
            assert not edited.done()
        assert edited.result(30).shape == (16, 16, 3)
