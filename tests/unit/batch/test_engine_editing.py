"""An engine of one's own does the edits: the same bytes whoever shares its calls, whichever chunk they are in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from small_batch import MODEL, items_in
from tiny_family import build_edit_model

from ip2p.batch.chunk_worker import ChunkWorker
from ip2p.batch.editing import EngineEditing
from ip2p.batch.item import EditSettings
from ip2p.errors import InputError
from ip2p.images import decode_image
from ip2p.storage import LocalFolder


@pytest.fixture(scope="module")
def edit_folder(tmp_path_factory: pytest.TempPathFactory):
    return build_edit_model(tmp_path_factory.mktemp("edit") / "model")


@pytest.fixture(scope="module")
def editing(edit_folder) -> Iterator[EngineEditing]:
    made = EngineEditing(str(edit_folder), "float32", "cpu", 12)
    yield made
    made.close()


def test_outputs_have_the_same_bytes_in_one_chunk_and_in_many(editing, tmp_path):
    items = items_in(tmp_path / "in", 6, steps=2)
    before = editing.row_evals
    together, apart = LocalFolder(tmp_path / "together"), LocalFolder(tmp_path / "apart")
    worker = ChunkWorker(together, MODEL, editing)
    done = worker.run(1, items)
    assert (done.done, done.row_evals - before) == (6, 6 * 2 * 3)
    worker = ChunkWorker(apart, MODEL, editing, window=2)
    for item in reversed(items):
        worker.run(item.line, [item])
    for item in items:
        assert apart.read(item.output) == together.read(item.output)
        assert decode_image(apart.read(item.output)).shape == (16, 16, 3)
    assert not np.array_equal(decode_image(apart.read("0.png")), decode_image(apart.read("1.png")))


def test_what_the_engine_refuses_costs_only_its_item(editing, tmp_path):
    items = items_in(tmp_path / "in", 3, steps=1)
    odd = dataclasses.replace(items[1], settings=EditSettings(steps=1, size="17x16"))
    wrong_mask = dataclasses.replace(items[2], mask=str(tmp_path / "mask.png"))
    LocalFolder(tmp_path).write("mask.png", LocalFolder(tmp_path / "in").read("0.png"))
    done = ChunkWorker(LocalFolder(tmp_path / "out"), MODEL, editing).run(1, [items[0], odd, wrong_mask])
    assert (done.done, done.reasons) == (2, {"invalid_request": 1})


def test_a_model_whose_rows_depend_on_their_neighbours_is_refused(editing, edit_folder, monkeypatch):
    unet = type(editing.engine.model.unet)
    forward = unet.forward

    def leaking(self, sample, *rest, **named):
        answer = forward(self, sample, *rest, **named)
        answer.sample = answer.sample + 1e-6 * answer.sample.mean()
        return answer

    monkeypatch.setattr(unet, "forward", leaking)
    with pytest.raises(InputError, match="choose another number of rows"):
        EngineEditing(str(edit_folder), "float32", "cpu", 12)
