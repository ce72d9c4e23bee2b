"""Chunks of items: what is read, asked for and written, what fails how, and what a second look finds."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_batch import MODEL, FailingFolder, Gate, Negative, file_of, items_in, pixels, until

from ip2p.batch import chunk_worker
from ip2p.batch.attempts import load_attempts
from ip2p.batch.chunk_worker import ChunkDone, ChunkWorker
from ip2p.batch.editing import CopyEditing
from ip2p.batch.failures import ATTEMPTS
from ip2p.batch.item import EditSettings, Item
from ip2p.batch.places import PARTS
from ip2p.batch.records import Records
from ip2p.errors import CheckpointError, DeviceError, EditError, InputError, JobError, PictureError, StorageError
from ip2p.images import carried_text, decode_image
from ip2p.storage import Folder, LocalFolder, open_folder

pytestmark = pytest.mark.usefixtures("no_waits")

AWAY = StorageError("the store is away", "away")


@pytest.fixture
def output(tmp_path: Path) -> FailingFolder:
    """Where results go; it notes what is written in which order."""
    return FailingFolder(tmp_path / "out")


@pytest.fixture
def made() -> Iterator[list[ChunkWorker]]:
    workers: list[ChunkWorker] = []
    yield workers
    for one in workers:
        one.close()


@pytest.fixture
def worker(output: FailingFolder, made: list[ChunkWorker]) -> Callable[..., ChunkWorker]:
    def make(editing: object = None, where: Folder | None = None, **more: object) -> ChunkWorker:
        made.append(ChunkWorker(where or output, MODEL, editing or Negative(), **more))
        return made[-1]

    return make


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Three of them; each has its number as instruction, and its picture on the disk."""
    return items_in(tmp_path / "in", 3)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FailingFolder:
    """From here on local pictures are read from this folder, which can fail."""
    folder = FailingFolder(tmp_path / "in")
    monkeypatch.setattr(chunk_worker, "open_folder", lambda uri: folder)
    return folder


def records_in(folder: Folder) -> dict[str, dict]:
    """Of all parts, by id."""
    lines = [line for name in folder.list(PARTS) for line in folder.read(name).decode().splitlines()]
    return {record["id"]: record for record in map(json.loads, lines)}


def error_of(folder: Folder, id_: str = "0") -> tuple[str, str, int]:
    """Code, stage and attempts of a failed item."""
    record = records_in(folder)[id_]
    assert record["status"] == "failed"
    assert record["error"]["message"]
    return record["error"]["code"], record["error"]["stage"], record["attempts"]


def one_item(tmp_path: Path, data: bytes, name: str = "picture.png", **changes: object) -> Item:
    """An item whose picture holds ``data``."""
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_bytes(data)
    item = Item(1, "0", str(tmp_path / "in" / name), "0", "0.png", EditSettings())
    return dataclasses.replace(item, **changes)


# ---- what goes well


def test_each_item_is_edited_written_and_recorded(worker, output, items):
    done = worker().run(1, items)
    assert dataclasses.replace(done, edit_s=()) == ChunkDone(done=3, row_evals=9)
    assert len(done.edit_s) == 3
    for number, item in enumerate(items):
        file = output.read(item.output)
        assert np.array_equal(decode_image(file), 255 - pixels(number))
        record = records_in(output)[item.id]
        assert record == {
            "key": item.key(MODEL), "id": item.id, "line": number + 1, "image": item.image, "instruction": item.id,
            "output": item.output, "status": "done", "seed": item.seed, "width": 16, "height": 16, "bytes": len(file),
            "version": LocalFolder(Path(item.image).parent).read_versioned(f"{number}.png")[1], "found": False,
            "fingerprint": item.fingerprint(MODEL, record["version"]), "seconds": record["seconds"],
            "ended_at": record["ended_at"],
        }  # fmt: skip
        assert json.loads(carried_text(file)) == {
            "id": item.id, "instruction": item.id, "steps": 20, "seed": item.seed, "sampler": "euler_ancestral",
            "restore_size": False, "output_format": "png", "model": MODEL, "fingerprint": record["fingerprint"],
        }  # fmt: skip
    assert [name for name in output.list() if not name.startswith(PARTS)] == ["0.png", "1.png", "2.png"]
    with Records() as records:
        assert records.load(output) == 1
        assert [records.status(item.key(MODEL)) for item in items] == ["done"] * 3


def test_without_edits_pictures_come_back_as_they_are(worker, output, items):
    assert worker(CopyEditing()).run(1, items).row_evals == 0
    assert np.array_equal(decode_image(output.read("1.png")), pixels(1))


def test_a_chunk_of_nothing_is_done(worker, output):
    assert worker().run(1, []) == ChunkDone()


def test_everything_that_is_asked_arrives_at_the_editor(worker, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    (tmp_path / "mask.png").write_bytes(file_of(np.repeat(mask[:, :, None], 3, axis=2)))
    settings = EditSettings(
        steps=7, guidance_scale=3.5, image_guidance_scale=1.25, seed=9, negative_prompt="day", sampler="dpmpp_2m",
        resolution=64, restore_size=True, output_format="webp",
    )  # fmt: skip
    editing = Negative()
    item = one_item(tmp_path, file_of(pixels()), settings=settings, mask=str(tmp_path / "mask.png"))
    worker(editing).run(1, [item])
    (asked,) = editing.asked
    assert np.array_equal(asked.image, pixels())
    assert np.array_equal(asked.mask, mask)
    assert (asked.instruction, asked.steps, asked.guidance_scale, asked.image_guidance_scale) == ("0", 7, 3.5, 1.25)
    assert (asked.seed, asked.negative_prompt, asked.sampler, asked.resolution) == (9, "day", "dpmpp_2m", 64)
    assert (asked.size, asked.restore_size, asked.batch, asked.alone) == (None, True, True, False)


def test_what_nobody_asked_for_is_left_to_the_model(worker, items):
    editing = Negative()
    worker(editing).run(1, items[:1])
    (asked,) = editing.asked
    assert (asked.guidance_scale, asked.image_guidance_scale, asked.resolution, asked.size) == (None,) * 4
    assert (asked.mask, asked.negative_prompt, asked.restore_size) == (None, "", False)
    assert asked.seed == items[0].seed


def test_a_size_arrives_as_width_and_height(worker, tmp_path):
    editing = Negative()
    worker(editing).run(1, [one_item(tmp_path, file_of(pixels()), settings=EditSettings(size="64x32"))])
    assert editing.asked[0].size == (64, 32)


def test_a_transparent_part_of_a_mask_is_edited(worker, tmp_path):
    alpha = np.full((16, 16, 4), 255, np.uint8)
    alpha[4:, :, 3] = 0
    (tmp_path / "mask.png").write_bytes(file_of(Image.fromarray(alpha)))
    editing = Negative()
    worker(editing).run(1, [one_item(tmp_path, file_of(pixels()), mask=str(tmp_path / "mask.png"))])
    assert np.array_equal(editing.asked[0].mask, 255 - alpha[:, :, 3])


@pytest.mark.parametrize(("image_format", "off"), [("png", 0), ("jpeg", 8), ("webp", 8)])
def test_each_format_is_written_read_and_found_again(worker, output, tmp_path, image_format, off):
    ramp = np.repeat(np.arange(0, 256, 16, dtype=np.uint8)[:, None], 16, axis=1)
    picture = np.repeat(ramp[:, :, None], 3, axis=2)
    item = one_item(tmp_path, file_of(picture), settings=EditSettings(output_format=image_format))
    worker().run(1, [item])
    file = output.read("0.png")
    with Image.open(output.root / "0.png") as written:
        assert written.format == image_format.upper()
    assert np.abs(decode_image(file).astype(int) - (255 - picture)).max() <= off
    editing = Negative()
    done = worker(editing).run(1, [item], look_first=True)
    assert (done.skipped, editing.asked) == (1, [])


@pytest.mark.parametrize(("image_format", "suffix"), [("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "png")])
def test_each_format_is_read(worker, output, tmp_path, image_format, suffix):
    data = file_of(pixels(), image_format)
    worker(CopyEditing()).run(1, [one_item(tmp_path, data, f"a.{suffix}")])
    assert np.array_equal(decode_image(output.read("0.png")), decode_image(data))


def test_a_picture_in_the_row_itself_is_edited_and_not_recorded(worker, output, tmp_path):
    uri = f"data:image/png;base64,{base64.b64encode(file_of(pixels())).decode()}"
    item = one_item(tmp_path, b"", image=uri, mask=uri)
    editing = Negative()
    worker(editing, allowed=("s3://bucket/",)).run(1, [item])
    assert np.array_equal(editing.asked[0].image, pixels())
    assert editing.asked[0].mask is not None
    record = records_in(output)["0"]
    assert (record["image"], record["version"]) == ("data:", "")
    assert record["fingerprint"] == item.fingerprint(MODEL, "")


@pytest.mark.service
def test_pictures_come_from_s3_and_go_there(s3_uri, worker):
    folder = open_folder(s3_uri)
    made = []
    for number in range(12):
        folder.write(f"in/{number}.png", file_of(pixels(number)))
        item = Item(
            number + 1, str(number), f"{s3_uri}/in/{number}.png", str(number), f"o/{number}.png", EditSettings()
        )
        made.append(dataclasses.replace(item, mask=f"{s3_uri}/in/0.png"))
    missing = dataclasses.replace(made[0], id="12", image=f"{s3_uri}/in/gone.png", output="o/gone.png")
    output = open_folder(f"{s3_uri}/out")
    done = worker(where=output).run(1, [*made, missing])
    assert (done.done, done.reasons) == (12, {"not_found": 1})
    assert np.array_equal(decode_image(output.read("o/7.png")), 255 - pixels(7))
    assert load_attempts(output) == {}
    editing = Negative()
    assert worker(editing, where=output).run(1, made, look_first=True).skipped == 12
    assert editing.asked == []
    folder.write("in/3.png", file_of(pixels(99)))
    done = worker(editing, where=output).run(1, made, look_first=True)
    assert (done.skipped, [asked.instruction for asked in editing.asked]) == (11, ["3"])
    assert np.array_equal(decode_image(output.read("o/3.png")), 255 - pixels(99))


# ---- the item's own faults


def png_that_claims(width: int, height: int) -> bytes:
    """A small file whose header says that it is so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"only words", "unsupported_format"),
        (b"GIF89a" + bytes(100), "unsupported_format"),
        (b"", "damaged_picture"),
        (file_of(pixels())[:200], "damaged_picture"),
        (b"\x89PNG\r\n\x1a\n", "damaged_picture"),
        (file_of(pixels(width=4, height=4)), "damaged_picture"),
        (png_that_claims(9000, 9000), "picture_too_large"),
        (png_that_claims(2**31 - 1, 2**31 - 1), "picture_too_large"),
    ],
    ids=["text", "gif", "empty", "cut short", "a beginning", "tiny", "large", "a bomb"],
)
@pytest.mark.parametrize("which", ["image", "mask"])
def test_what_is_no_picture_fails_at_the_first_try(worker, output, tmp_path, data, code, which):
    if which == "image":
        item = one_item(tmp_path, data)
    else:
        (tmp_path / "mask.png").write_bytes(data)
        item = one_item(tmp_path, file_of(pixels()), mask=str(tmp_path / "mask.png"))
    editing = Negative()
    done = worker(editing).run(1, [item])
    assert (done.done, done.failed, done.reasons, done.edit_s) == (0, 1, {code: 1}, ())
    assert error_of(output) == (code, "read", 1)
    assert editing.asked == []
    assert load_attempts(output) == {}
    assert not output.exists("0.png")


def test_the_limit_of_pixels_is_the_workers_own(worker, output, tmp_path):
    picture = file_of(pixels(width=20, height=10))
    worker(max_pixels=200).run(1, [one_item(tmp_path, picture)])
    assert records_in(output)["0"]["status"] == "done"
    worker(max_pixels=199).run(2, [one_item(tmp_path, picture, output="b.png", id="b")])
    assert error_of(output, "b")[0] == "picture_too_large"


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("data:image/png,abc", "unsupported_format"),
        ("data:", "unsupported_format"),
        ("data:image/png;base64,###", "damaged_picture"),
        ("data:image/png;base64,AAA", "damaged_picture"),
        ("data:image/png;base64,", "damaged_picture"),
        ("data:image/png;base64,AAAA", "unsupported_format"),
        ("data:image/png;base64,caf\u00e9", "damaged_picture"),
    ],
)
def test_a_picture_in_the_row_that_is_none_fails_at_the_first_try(worker, output, tmp_path, uri, code):
    worker().run(1, [one_item(tmp_path, b"", image=uri)])
    assert error_of(output) == (code, "read", 1)


@pytest.mark.parametrize(
    ("error", "code", "tries"),
    [
        (StorageError("gone", "missing"), "not_found", 1),
        (StorageError("no right", "denied"), "access_denied", 1),
        (StorageError("input/output error", "other"), "storage_error", ATTEMPTS),
        (RuntimeError("surprise"), "internal_error", ATTEMPTS),
    ],
)
def test_a_picture_that_cannot_be_read_fails_with_a_code(worker, output, pictures, items, error, code, tries):
    pictures.fails["read_versioned"] = [error] * ATTEMPTS
    done = worker().run(1, items[:1])
    assert done.reasons == {code: 1}
    assert error_of(output) == (code, "read", tries)
    assert len(pictures.fails["read_versioned"]) == ATTEMPTS - tries


def test_a_picture_that_is_not_there_costs_only_its_item(worker, output, items):
    Path(items[1].image).unlink()
    done = worker().run(1, items)
    assert (done.done, done.failed, done.reasons) == (2, 1, {"not_found": 1})
    assert error_of(output, "1") == ("not_found", "read", 1)
    assert output.exists("0.png")
    assert output.exists("2.png")
    record = records_in(output)["1"]
    assert {"key", "id", "line", "image", "instruction", "output", "status", "error", "attempts"} == set(record)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("the UNet gave NaN"), "edit_failed"),
        (InputError("a mask of another size"), "invalid_request"),
        (PictureError("too small"), "damaged_picture"),
    ],
)
def test_an_edit_that_will_never_do_is_tried_once(worker, output, items, error, code):
    editing = Negative({"1": [error] * 9})
    done = worker(editing).run(1, items)
    assert (done.done, done.reasons) == (2, {code: 1})
    assert error_of(output, "1") == (code, "edit", 1)
    assert records_in(output)["1"]["error"]["message"] == str(error)
    assert len(editing.asked) == 3
    assert load_attempts(output) == {}


# ---- places that may be read


@pytest.mark.parametrize("which", ["image", "mask"])
def test_only_what_is_allowed_is_read(worker, output, tmp_path, which):
    inside = one_item(tmp_path, file_of(pixels()))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(file_of(pixels()))
    outside = dataclasses.replace(inside, id="1", output="1.png", **{which: str(tmp_path / "elsewhere" / "a.png")})
    done = worker(allowed=("s3://bucket/in/", f"{tmp_path}/in/")).run(1, [inside, outside])
    assert (done.done, done.reasons) == (1, {"invalid_request": 1})
    assert error_of(output, "1") == ("invalid_request", "read", 1)
    said = records_in(output)["1"]["error"]["message"]
    assert said.endswith(f"is not below s3://bucket/in/ or {tmp_path}/in/, where this job may read")


def test_what_is_allowed_ends_at_the_border_of_a_folder(worker, output, tmp_path):
    (tmp_path / "in-secret").mkdir()
    (tmp_path / "in-secret" / "a.png").write_bytes(file_of(pixels()))
    item = one_item(tmp_path, b"", image=str(tmp_path / "in-secret" / "a.png"))
    worker(allowed=(f"{tmp_path}/in",)).run(1, [item])
    assert error_of(output) == ("invalid_request", "read", 1)


# ---- what may pass


@pytest.mark.parametrize("stage", ["read", "edit"])
def test_an_item_that_fails_twice_is_done_at_the_third_try(worker, output, pictures, items, stage):
    editing = Negative()
    if stage == "edit":
        editing.fails = {"0": [EditError("once"), RuntimeError("twice")]}
    else:
        pictures.fails["read_versioned"] = [StorageError("once"), RuntimeError("twice")]
    done = worker(editing).run(1, items[:1])
    assert (done.done, done.failed) == (1, 0)
    assert load_attempts(output) == {items[0].key(MODEL): 2}
    assert np.array_equal(decode_image(output.read("0.png")), 255 - pixels(0))


def test_each_attempt_is_noted_when_it_was_made(worker, output, items):
    editing = Negative({"0": [EditError("x")] * 3})
    worker(editing).run(1, items[:1])
    key = items[0].key(MODEL)
    assert [name for name in output.written if "attempts" in name] == [f"_job/attempts/{key}-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("error", "code"), [(EditError("it failed"), "edit_failed"), (ZeroDivisionError("it failed"), "internal_error")]
)
def test_an_item_that_always_fails_is_given_up_at_the_fifth_try(worker, output, items, error, code):
    editing = Negative({"1": [error] * 9})
    done = worker(editing).run(1, items)
    assert (done.done, done.failed, done.reasons) == (2, 1, {code: 1})
    assert error_of(output, "1") == (code, "edit", 5)
    assert sum(asked.instruction == "1" for asked in editing.asked) == 5
    assert load_attempts(output) == {items[1].key(MODEL): 4}
    assert not output.exists("1.png")


def test_attempts_of_all_stages_count_together(worker, output, pictures, items):
    pictures.fails["read_versioned"] = [RuntimeError("x")] * 3
    editing = Negative({"0": [EditError("x")] * 2})
    worker(editing).run(1, items[:1])
    assert error_of(output) == ("edit_failed", "edit", 5)
    assert len(editing.asked) == 2


@pytest.mark.parametrize(("before", "tries"), [(0, 5), (3, 2), (4, 1), (5, 1), (6, 1)])
def test_attempts_of_runs_before_count_too(worker, output, items, before, tries):
    editing = Negative({"1": [EditError("x")] * 9})
    worker(editing).run(1, items, [0, before, 0])
    assert sum(asked.instruction == "1" for asked in editing.asked) == tries
    assert error_of(output, "1")[2] == before + tries


# ---- stores that are away


def test_a_store_that_is_away_for_a_while_is_no_items_fault(worker, output, pictures, items):
    pictures.fails["read_versioned"] = [AWAY] * 9
    assert worker().run(1, items).done == 3
    assert load_attempts(output) == {}


@pytest.mark.parametrize("method", ["write_if", "write"])
def test_an_output_that_is_away_for_a_while_is_no_items_fault(worker, output, items, method):
    output.fails[method] = [AWAY] * 7
    editing = Negative()
    assert worker(editing).run(1, items).done == 3
    assert len(editing.asked) == 3
    assert load_attempts(output) == {}
    assert output.fails[method] == []


def test_a_server_that_is_away_for_a_while_is_no_items_fault(worker, output, items):
    editing = Negative({"0": [AWAY] * 8})
    assert worker(editing).run(1, items).done == 3
    assert load_attempts(output) == {}


def test_an_attempt_is_noted_through_an_outage(worker, output, items):
    output.fails["write"] = [AWAY, AWAY]
    assert worker(Negative({"0": [EditError("x")]})).run(1, items[:1]).done == 1
    assert load_attempts(output) == {items[0].key(MODEL): 1}


def test_an_existing_output_is_looked_at_through_an_outage(worker, output, items):
    worker().run(1, items)
    output.fails["read"] = [AWAY] * 4
    assert worker().run(1, items, look_first=True).skipped == 3


def test_a_store_that_stays_away_stops_the_job(worker, output, pictures, items):
    pictures.fails["read_versioned"] = [AWAY] * 1_000_000
    with pytest.raises(JobError, match=r"gave up after 0\.05 s: the store is away"):
        worker(outage_s=0.05).run(1, items)
    assert output.list() == []


# ---- what stops the job


@pytest.mark.parametrize("kind", ["refused", "full"])
def test_keys_that_are_refused_stop_the_job_at_reading(worker, output, pictures, items, kind):
    pictures.fails["read_versioned"] = [StorageError("words", kind)]
    with pytest.raises(StorageError, match="words"):
        worker().run(1, items)
    assert output.list(PARTS) == []


@pytest.mark.parametrize("kind", ["refused", "full", "denied", "other", "missing"])
def test_an_output_that_cannot_be_written_stops_the_job(worker, output, items, kind):
    output.fails["write_if"] = [StorageError("words", kind)]
    with pytest.raises(StorageError, match="words"):
        worker().run(1, items)
    assert output.list(PARTS) == []


def test_records_that_cannot_be_written_stop_the_job_and_outputs_stay(worker, output, items):
    output.fails["write"] = [None, None, None, StorageError("words", "full")]
    with pytest.raises(StorageError, match="words"):
        worker().run(1, items)
    assert output.list() == ["0.png", "1.png", "2.png"]


def test_an_accelerator_that_fails_stops_the_job(worker, output, items):
    error = DeviceError("the GPU fell off the bus")
    with pytest.raises(DeviceError) as caught:
        worker(Negative({"1": [error]}), window=1).run(1, items)
    assert caught.value is error
    assert output.list() == ["0.png"]


def test_after_what_stopped_the_job_nothing_more_is_begun(worker, items):
    editing = Negative({"0": [DeviceError("the end")]})
    one = worker(editing, window=1)
    with pytest.raises(DeviceError):
        one.run(1, items)
    asked = len(editing.asked)
    with pytest.raises(DeviceError, match="the end"):
        one.run(2, items)
    assert len(editing.asked) == asked


def test_what_stops_one_chunk_ends_the_waiting_of_another_and_is_what_all_say(worker, items, monkeypatch):
    monkeypatch.setattr("ip2p.batch.failures.FIRST_WAIT_S", 60.0)
    monkeypatch.setattr("ip2p.batch.failures.LONGEST_WAIT_S", 60.0)
    editing = Negative({"0": [EditError("wait a minute")], "1": [AWAY], "2": [DeviceError("the end")]})
    one, ended = worker(editing), []

    def run(number: int, item: Item) -> None:
        with pytest.raises(DeviceError, match="the end"):
            one.run(number, [item])
        ended.append(number)

    threads = [threading.Thread(target=run, args=(number, items[number])) for number in (0, 1)]
    for thread in threads:
        thread.start()
    until(lambda: len(editing.asked) == 2, "both have failed and wait")
    with pytest.raises(DeviceError):
        one.run(2, items[2:])
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == [0, 1]


def test_what_stops_the_job_does_not_wait_for_the_items_before_it(worker, items, monkeypatch):
    monkeypatch.setattr("ip2p.batch.failures.FIRST_WAIT_S", 60.0)
    monkeypatch.setattr("ip2p.batch.failures.LONGEST_WAIT_S", 60.0)
    editing = Negative({"0": [AWAY], "2": [DeviceError("the end")]})
    one, raised = worker(editing), []

    def run() -> None:
        try:
            one.run(1, items)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(5)
    soon = not thread.is_alive()
    one.close()
    thread.join()
    assert soon, "the first item waits for its store, and the job with it"
    assert isinstance(raised[0], DeviceError)


def test_closing_ends_what_waits_and_closes_the_editor(worker, items, monkeypatch):
    monkeypatch.setattr("ip2p.batch.failures.FIRST_WAIT_S", 60.0)
    monkeypatch.setattr("ip2p.batch.failures.LONGEST_WAIT_S", 60.0)
    editing = Negative({"0": [EditError("wait a minute")]})
    one = worker(editing)

    def run() -> None:
        with pytest.raises(JobError, match="the job was stopped"):
            one.run(1, items[:1])

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: editing.asked, "it was tried")
    one.close()
    thread.join(10)
    assert not thread.is_alive()
    assert editing.closed


# ---- one item that cannot be written


def test_a_result_that_its_format_cannot_hold_costs_only_its_item(worker, output, tmp_path, items):
    # WebP ends at 16383 pixels a side; the picture is read, for it has few pixels in all.
    wide = one_item(tmp_path, file_of(pixels(width=17_000, height=8)), id="w", output="w.webp")
    wide = dataclasses.replace(wide, settings=EditSettings(output_format="webp"))
    done = worker(CopyEditing()).run(1, [wide, *items])
    assert (done.done, done.reasons) == (3, {"invalid_request": 1})
    assert error_of(output, "w") == ("invalid_request", "edit", 1)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "0.png/below.png", "in the way"])
def test_an_output_whose_name_the_disk_does_not_take_costs_only_its_item(worker, output, tmp_path, items, name):
    # The manifest lets such names through: S3 takes them.
    (tmp_path / "out" / "in the way").mkdir(parents=True)
    bad = one_item(tmp_path, file_of(pixels()), id="bad", output=name)
    done = worker(window=1).run(1, [*items, bad])
    assert (done.done, done.reasons) == (3, {"invalid_request": 1})
    assert error_of(output, "bad") == ("invalid_request", "write", 1)


def test_a_picture_that_is_a_folder_fails_at_the_first_try(worker, output, tmp_path):
    worker().run(1, [one_item(tmp_path, b"", image=str(tmp_path / "in"))])
    assert error_of(output) == ("invalid_request", "read", 1)


def test_a_picture_below_a_file_fails_at_the_first_try(worker, output, tmp_path):
    item = one_item(tmp_path, b"")
    worker().run(1, [dataclasses.replace(item, image=f"{item.image}/a.png")])
    assert error_of(output) == ("invalid_request", "read", 1)


# ---- outputs that are there already


def test_outputs_that_are_there_are_found_if_they_are_looked_for(worker, output, items):
    worker().run(1, items)
    before = {item.output: output.read_versioned(item.output) for item in items}
    editing = Negative()
    done = worker(editing).run(1, items, look_first=True)
    assert done == ChunkDone(done=3, skipped=3)
    assert editing.asked == []
    assert {item.output: output.read_versioned(item.output) for item in items} == before
    record = records_in(output)["0"]
    assert record["found"] is True
    assert record["bytes"] == len(before["0.png"][0])
    assert record["fingerprint"] == items[0].fingerprint(MODEL, record["version"])
    assert "seconds" not in record


def test_only_what_is_missing_is_edited(worker, output, items):
    worker().run(1, items[:1])
    editing = Negative()
    done = worker(editing).run(1, items, look_first=True)
    assert (done.done, done.skipped) == (3, 1)
    assert sorted(asked.instruction for asked in editing.asked) == ["1", "2"]


def test_outputs_that_are_there_are_not_read_if_they_are_not_looked_for(worker, output, items):
    output.fails["read"] = [RuntimeError("nobody asked for this")]
    assert worker().run(1, items).done == 3
    assert len(output.fails["read"]) == 1


def test_an_output_that_is_there_is_never_written_twice(worker, output, items):
    worker().run(1, items)
    before = {item.output: output.read_versioned(item.output) for item in items}
    done = worker().run(1, items)
    assert (done.done, done.skipped) == (3, 0)
    assert {item.output: output.read_versioned(item.output) for item in items} == before


def test_a_write_whose_answer_was_lost_counts(worker, output, items):
    output.lose = 3
    done = worker().run(1, items)
    assert (done.done, done.failed) == (3, 0)
    assert sorted(name for name in output.written if name.endswith(".png")) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("look_first", [False, True])
@pytest.mark.parametrize(
    "foreign",
    [
        b"somebody's notes",
        b"",
        file_of(pixels(9)),
        file_of(pixels(9), "JPEG"),
        file_of(pixels(9), "WEBP"),
        png_that_claims(30_000, 30_000),
    ],
    ids=["text", "empty", "png", "jpeg", "webp", "bomb"],
)
def test_a_file_that_is_no_output_of_a_batch_is_left_alone(worker, output, items, foreign, look_first):
    LocalFolder(output.root).write("1.png", foreign)
    done = worker().run(1, items, look_first=look_first)
    assert (done.done, done.reasons) == (2, {"invalid_request": 1})
    assert error_of(output, "1") == ("invalid_request", "write", 1)
    assert "1.png: there is a file that is no output of a batch" in records_in(output)["1"]["error"]["message"]
    assert output.read("1.png") == foreign


@pytest.mark.parametrize("about", ["{}", "[]", "7", "not json", '{"fingerprint": ""}', '{"fingerprint": null}'])
def test_a_picture_that_carries_other_words_is_left_alone(worker, output, items, about):
    from ip2p.images import encode_image

    foreign = encode_image(pixels(9), about=about)
    LocalFolder(output.root).write("0.png", foreign)
    worker().run(1, items[:1], look_first=True)
    assert error_of(output) == ("invalid_request", "write", 1)
    assert output.read("0.png") == foreign


@pytest.mark.parametrize("look_first", [False, True])
@pytest.mark.parametrize("what", ["settings", "model", "picture", "mask", "instruction"])
def test_an_output_of_an_earlier_request_is_replaced(output, made, tmp_path, what, look_first):
    (tmp_path / "mask.png").write_bytes(file_of(pixels(5)))
    item = one_item(tmp_path, file_of(pixels()), mask=str(tmp_path / "mask.png"))
    made.append(ChunkWorker(output, MODEL, Negative()))
    made[-1].run(1, [item])
    before = output.read("0.png")
    model = MODEL
    if what == "settings":
        item = dataclasses.replace(item, settings=EditSettings(steps=3))
    elif what == "model":
        model = "another model"
    elif what == "picture":
        Path(item.image).write_bytes(file_of(pixels(1)))
    elif what == "mask":
        Path(item.mask).write_bytes(file_of(pixels(6)))
        os.utime(item.mask, ns=(1, 1))
    else:
        item = dataclasses.replace(item, instruction="another")
    made.append(ChunkWorker(output, model, Negative()))
    done = made[-1].run(2, [item], look_first=look_first)
    assert (done.done, done.skipped) == (1, 0)
    assert output.read("0.png") != before
    assert json.loads(carried_text(output.read("0.png")))["fingerprint"] == records_in(output)["0"]["fingerprint"]


# ---- order, and how many at a time


def test_records_are_written_after_all_outputs_of_their_chunk(worker, output, tmp_path):
    items = items_in(tmp_path / "in", 12)
    worker(window=4, fence=3).run(7, items)
    assert sorted(output.written[:-1]) == sorted(item.output for item in items)
    assert output.written[-1].startswith(f"{PARTS}000003-000000000007-")


def test_records_are_in_the_order_of_the_items(worker, output, tmp_path):
    items = items_in(tmp_path / "in", 12)
    worker(window=4).run(7, items)
    (part,) = output.list(PARTS)
    assert [json.loads(line)["id"] for line in output.read(part).splitlines()] == [item.id for item in items]


def test_several_chunks_share_one_window(worker, output, tmp_path):
    items = items_in(tmp_path / "in", 8)
    gate = Gate()
    one = worker(gate, window=6)
    with ThreadPoolExecutor(2) as callers:
        chunks = [callers.submit(one.run, number, items[number : number + 4]) for number in (0, 4)]
        until(lambda: len(gate.inside) == 6, "the window is full")
        assert gate.inside & {"0", "1", "2", "3"}
        assert gate.inside & {"4", "5", "6", "7"}
        gate.open.set()
        assert [chunk.result(10).done for chunk in chunks] == [4, 4]
    assert gate.most == 6
    assert len(output.list(PARTS)) == 2


@pytest.mark.parametrize("again", [[0, 2], [0, 1, 2]])
def test_items_that_a_later_submission_tried_again_are_recorded_as_done(worker, output, items, again):
    keys = [item.key(MODEL) for item in items]
    with Records() as records:
        worker(Negative({number: [CheckpointError("NaN")] for number in ("0", "2")})).run(1, items)
        records.load(output)
        assert [records.status(key) for key in keys] == ["failed", "done", "failed"]
        worker(fence=2).run(1, [items[number] for number in again])
        records.load(output)
        assert [records.status(key) for key in keys] == ["done"] * 3
