"""What a batch leaves behind: results in order, lines to try again, OpenAI's answers, durations, a sheet, a status."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_batch import MODEL, FailingFolder, Negative, file_of, items_in, pixels

from ip2p.batch.chunk_worker import ChunkWorker
from ip2p.batch.item import EditSettings, Item
from ip2p.batch.manifest import Rejected, Source, answers_openai, entries
from ip2p.batch.openai_lines import answer_line
from ip2p.batch.records import Records
from ip2p.batch.report import SAMPLED, Durations, Usage, contact_sheet, lines_of, row_of, write_lines
from ip2p.errors import CheckpointError, StorageError
from ip2p.storage import Folder, LocalFolder

SETTINGS = EditSettings(
    steps=7, guidance_scale=3.5, image_guidance_scale=0.0, seed=0, negative_prompt="day", sampler="dpmpp_2m",
    resolution=64, restore_size=True, output_format="webp",
)  # fmt: skip


def lines_in(folder: Folder, name: str) -> list[dict]:
    return [json.loads(line) for line in folder.read(name).splitlines()]


def error(code: str = "not_found") -> dict[str, str]:
    return {"code": code, "message": "words", "stage": "read"}


def a_record(item: Item, status: str = "done", **more: object) -> dict[str, object]:
    said = {"key": item.key(MODEL), "id": item.id, "line": item.line, "output": item.output, "status": status}
    return {**said, **({"ended_at": 77} if status == "done" else {"error": error(), "attempts": 5}), **more}


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    return items_in(tmp_path / "in", 5)


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "out")


def manifest(path: Path, rows: list[object]) -> Source:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Source(str(path))


# ---- lines


def test_results_are_in_the_order_of_the_manifest_whatever_became_of_a_line(tmp_path, output, items):
    rows = [row_of(item) for item in items]
    rows[1] = {"id": "b", "image": "x.png"}
    source = manifest(tmp_path / "m.jsonl", [*rows[:3], "broken", *rows[3:], rows[0]])
    with Records() as records:
        records.add([a_record(items[2], "failed"), a_record(items[0], seconds=1.5, line=99)])
        write_lines(output, lines_of(source, MODEL, records), openai=False)
    results = lines_in(output, "results.jsonl")
    assert [(one["line"], one["status"]) for one in results] == [
        (1, "done"), (2, "rejected"), (3, "failed"), (4, "rejected"), (5, "waiting"), (6, "waiting"), (7, "rejected")
    ]  # fmt: skip
    assert results[0] == {**a_record(items[0]), "seconds": 1.5}
    assert results[1]["id"] == "b"
    assert results[1]["error"]["code"] == "invalid_request"
    assert results[1]["error"]["stage"] == "manifest"
    assert results[2] == {**a_record(items[2], "failed")}
    assert results[4] == {"line": 5, "id": "3", "status": "waiting"}
    assert [(one["line"], one["id"]) for one in lines_in(output, "rejected.jsonl")] == [(2, "b"), (4, ""), (7, "0")]
    assert lines_in(output, "rejected.jsonl")[0]["message"].startswith("no instruction")
    (failed,) = lines_in(output, "failed.jsonl")
    assert (failed["id"], failed["error"], failed["attempts"]) == ("2", error(), 5)
    assert set(output.list()) == {"results.jsonl", "failed.jsonl", "rejected.jsonl"}


def test_records_of_another_model_are_not_those_of_this_one(tmp_path, items):
    source = manifest(tmp_path / "m.jsonl", [row_of(items[0])])
    with Records() as records:
        records.add([a_record(items[0])])
        assert [record is None for _, record in lines_of(source, MODEL, records)] == [False]
        assert [record is None for _, record in lines_of(source, "another", records)] == [True]


def test_where_nothing_fails_any_more_the_old_files_are_removed(output, items):
    bad = Rejected(2, "words")
    write_lines(output, iter([(items[0], a_record(items[0], "failed")), (bad, None)]), openai=False)
    assert set(output.list()) == {"results.jsonl", "failed.jsonl", "rejected.jsonl"}
    write_lines(output, iter([(items[0], a_record(items[0]))]), openai=False)
    assert output.list() == ["results.jsonl"]
    write_lines(output, iter([]), openai=False)
    assert output.read("results.jsonl") == b""


def test_files_are_written_to_s3_and_removed_there(folder, items):
    write_lines(folder, iter([(items[0], a_record(items[0], "failed"))]), openai=False)
    assert folder.list() == ["failed.jsonl", "results.jsonl"]
    write_lines(folder, iter([(items[0], a_record(items[0]))]), openai=False)
    assert folder.list() == ["results.jsonl"]


def test_a_disk_that_is_full_is_an_error_and_old_results_stay(tmp_path, items):
    folder = FailingFolder(tmp_path)
    write_lines(folder, iter([(items[0], a_record(items[0]))]), openai=False)
    before = folder.read("results.jsonl")
    folder.fails["write"] = [StorageError("the disk is full", "full")]
    with pytest.raises(StorageError, match="full"):
        write_lines(folder, iter([(items[1], a_record(items[1]))]), openai=False)
    assert folder.read("results.jsonl") == before


# ---- lines to try again


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"settings": SETTINGS},
        {"settings": EditSettings(size="64x32", seed=0, guidance_scale=0.0)},
        {"settings": EditSettings(restore_size=True)},
        {"mask": "/in/m.png"},
        {"version": "17-3"},
        {"image": "s3://b/a.png", "output": "deep/er/é.png"},
        {"image": "data:image/png;base64,AAAA"},
        {"instruction": 'say "é☃"'},
        {"id": "é/b c"},
    ],
)
def test_the_row_of_an_item_asks_for_exactly_that_item(tmp_path, items, changes):
    item = dataclasses.replace(items[0], **changes)
    (again,) = entries(manifest(tmp_path / "again.jsonl", [row_of(item)]))
    assert again == dataclasses.replace(item, line=1)
    assert again.key(MODEL) == item.key(MODEL)


def test_what_failed_is_a_manifest_of_the_same_items(tmp_path, output, items):
    failing = [dataclasses.replace(items[0], settings=SETTINGS), items[1]]
    write_lines(output, iter([(item, a_record(item, "failed")) for item in failing]), openai=False)
    again = list(entries(Source(f"{output.uri}/failed.jsonl")))
    assert [entry.message for entry in again if isinstance(entry, Rejected)] == []
    assert [item.key(MODEL) for item in again] == [item.key(MODEL) for item in failing]


@pytest.mark.parametrize("name", ["x" * 100 + "/" + "y" * 100 + "/a.png", "a b.JPG", "é.webp"])
def test_what_failed_below_a_prefix_can_be_tried_again(tmp_path, name):
    LocalFolder(tmp_path / "in").write(name, b"no picture")
    (item,) = entries(Source(str(tmp_path / "in"), is_prefix=True, instruction="make it night"))
    (again,) = entries(manifest(tmp_path / "again.jsonl", [row_of(item)]))
    assert again == item


# ---- OpenAI's answers


def openai_rows(items: list[Item]) -> list[object]:
    return [
        {"custom_id": item.id, "method": "POST", "url": "/v1/images/edits",
         "body": {"prompt": item.instruction, "images": [{"image_url": item.image}]}}
        for item in items
    ]  # fmt: skip


def test_lines_of_openai_are_answered_in_two_files(tmp_path, output, items):
    source = manifest(tmp_path / "m.jsonl", [*openai_rows(items[:4]), {"custom_id": "bad", "body": {"n": 2}}])
    found = [entry for entry in entries(source) if isinstance(entry, Item)]
    worker = ChunkWorker(output, MODEL, Negative({"1": [CheckpointError("the UNet gave NaN")]}))
    worker.run(1, found[:3])
    worker.close()
    assert answers_openai(source)
    with Records() as records:
        records.load(output)
        write_lines(output, lines_of(source, MODEL, records), openai=True)
    answers = lines_in(output, "output.jsonl")
    assert [answer["custom_id"] for answer in answers] == ["0", "2"]
    for answer in answers:
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert set(body) == {"created", "data"}
        assert base64.b64decode(body["data"][0]["b64_json"]) == output.read(f"{answer['custom_id']}.png")
    failed, rejected = lines_in(output, "error.jsonl")
    assert (failed["custom_id"], failed["response"]) == ("1", None)
    assert failed["error"] == {"code": "edit_failed", "message": "the UNet gave NaN"}
    assert rejected["custom_id"] == "bad"
    assert rejected["error"]["code"] == "invalid_request"
    assert "n must be 1" in rejected["error"]["message"]
    assert len({answer["id"] for answer in [*answers, failed, rejected]}) == 4


def test_the_error_file_is_removed_where_nothing_fails_and_the_output_file_stays(output, items):
    output.write("0.png", file_of(pixels()))
    write_lines(output, iter([(items[0], a_record(items[0], "failed"))]), openai=True)
    assert output.read("output.jsonl") == b""
    assert len(lines_in(output, "error.jsonl")) == 1
    write_lines(output, iter([(items[0], a_record(items[0]))]), openai=True)
    assert len(lines_in(output, "output.jsonl")) == 1
    assert not output.exists("error.jsonl")


def test_nobody_elses_lines_are_answered(output, items):
    output.write("0.png", file_of(pixels()))
    write_lines(output, iter([(items[0], a_record(items[0])), (items[1], a_record(items[1], "failed"))]), openai=False)
    assert not output.exists("output.jsonl")
    assert not output.exists("error.jsonl")


def test_an_answer_has_the_shape_of_openais():
    record = {"key": "k", "id": "one", "ended_at": 77, "error": {"code": "c", "message": "m", "stage": "read"}}
    assert json.loads(answer_line(record, b"file")) == {
        "id": "batch_req_k", "custom_id": "one", "error": None,
        "response": {"status_code": 200, "request_id": "k",
                     "body": {"created": 77, "data": [{"b64_json": base64.b64encode(b"file").decode()}]}},
    }  # fmt: skip
    assert json.loads(answer_line(record, None)) == {
        "id": "batch_req_k", "custom_id": "one", "response": None, "error": {"code": "c", "message": "m"}
    }  # fmt: skip


# ---- durations and cost


def test_percentiles_of_few_durations_are_exact():
    durations = Durations()
    assert durations.percentile(0.5) is None
    durations.add([3.0, 1.0])
    durations.add((2.0,))
    assert (durations.percentile(0.0), durations.percentile(0.5), durations.percentile(1.0)) == (1.0, 2.0, 3.0)
    assert (durations.percentile(0.25), durations.count) == (1.5, 3)


def test_of_many_durations_a_bounded_fair_sample_is_kept():
    durations = Durations()
    for start in range(0, 60_000, 1000):
        durations.add([float(number) for number in range(start, start + 1000)])
    assert durations.count == 60_000
    assert len(durations.seconds) == SAMPLED == 10_000
    assert len(set(durations.seconds)) == SAMPLED
    for share in (0.05, 0.5, 0.95):
        assert abs(durations.percentile(share) - share * 60_000) < 1200
    again = Durations()
    again.add([float(number) for number in range(60_000)])
    assert again.seconds == durations.seconds


def test_cost_is_that_of_the_devices_hours():
    assert Usage(device_seconds=5400).cost(2.0) == 3.0
    assert Usage(seconds=5400).cost(2.0) == 0.0


# ---- the sheet to look at


def size_of(sheet: bytes | None) -> tuple[int, int]:
    assert sheet is not None
    with Image.open(io.BytesIO(sheet)) as picture:
        assert picture.format == "PNG"
        return picture.size


def edited(output: LocalFolder, items: list[Item]) -> list[tuple[Item, dict]]:
    """``items`` as done, with their results."""
    for item in items:
        output.write(item.output, file_of(255 - pixels(item.line)))
    return [(item, a_record(item)) for item in items]


def rows_of(sheet: bytes | None) -> float:
    """How many edits are shown."""
    from ip2p.editing.before_after import HEAD, ROW

    return (size_of(sheet)[1] - HEAD) / ROW


def test_a_sheet_shows_edits_beside_their_originals(output, items):
    assert rows_of(contact_sheet(output, iter(edited(output, items[:2])))) == 2


def test_a_sheet_survives_pictures_that_are_gone_or_broken(output, items):
    lines = edited(output, items)
    Path(items[0].image).unlink()
    output.delete(items[1].output)
    output.write(items[2].output, b"no picture")
    Path(items[3].image).write_bytes(b"no picture")
    assert rows_of(contact_sheet(output, iter(lines))) == 1
    assert contact_sheet(output, iter(lines[:4])) is None


def test_a_sheet_shows_only_what_is_done(output, items):
    lines = edited(output, items[:1])
    others = [(items[1], a_record(items[1], "failed")), (items[2], None), (Rejected(4, "words"), None)]
    assert rows_of(contact_sheet(output, iter([*others, *lines]))) == 1
    assert contact_sheet(output, iter(others)) is None
    assert contact_sheet(output, iter([])) is None


def test_a_sheet_shows_no_more_than_a_dozen_and_reads_no_more_than_it_needs(tmp_path, output):
    items = items_in(tmp_path / "in", 30)
    lines = iter(edited(output, items))
    assert rows_of(contact_sheet(output, lines)) == 12
    assert len(list(lines)) >= 30 - 2 * 12
    for item in items[:20]:
        Path(item.image).unlink()
    assert rows_of(contact_sheet(output, iter(edited(output, items)))) == 4


def test_a_sheet_leaves_out_pictures_that_are_in_the_row_itself(output, items):
    inline = dataclasses.replace(items[0], image="data:image/png;base64,AAAA")
    lines = edited(output, [inline, items[1]])
    assert rows_of(contact_sheet(output, iter(lines))) == 1


def test_pictures_of_any_shape_fit_on_a_sheet(output, items):
    lines = edited(output, items[:1])
    Path(items[0].image).write_bytes(file_of(pixels(width=300, height=9)))
    output.write(items[0].output, file_of(np.zeros((200, 8, 3), np.uint8)))
    assert rows_of(contact_sheet(output, iter(lines))) == 1
