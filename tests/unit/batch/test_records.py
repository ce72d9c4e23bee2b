"""What became of items, and how often they were tried: written in small files, found again by whoever comes later."""

from __future__ import annotations

import json

import pytest
from small_batch import FailingFolder

from ip2p.batch.attempts import load_attempts, note_attempt
from ip2p.batch.places import PARTS
from ip2p.batch.records import Records, part_name, write_part
from ip2p.errors import DatasetError, StorageError
from ip2p.storage import LocalFolder

ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32


def done(key: str, **more: object) -> dict[str, object]:
    return {"key": key, "status": "done", "id": f"id of {key[0]}", "output": f"{key}.png", "seed": 2**32 - 1, **more}


def failed(key: str, attempts: int = 5, **more: object) -> dict[str, object]:
    error = {"code": "not_found", "message": "gone", "stage": "read"}
    said = {"key": key, "status": "failed", "output": f"{key}.png", "attempts": attempts, "error": error}
    return {**said, **more}


def test_a_record_is_found_by_its_key_as_it_was_written(folder):
    write_part(folder, 1, 1, [done(ONE, seconds=1.5, id="é\n\u2028"), failed(TWO)])
    with Records() as records:
        assert records.load(folder) == 1
        assert records.status(ONE) == "done"
        assert records.get(ONE) == done(ONE, seconds=1.5, id="é\n\u2028")
        assert records.status(TWO) == "failed"
        assert records.get(TWO) == failed(TWO)
        assert records.status(THREE) == ""
        assert records.get(THREE) is None


def test_without_parts_there_are_no_records(folder):
    with Records() as records:
        assert records.load(folder) == 0
        assert records.status(ONE) == ""


def test_parts_are_below_the_jobs_own_folder_and_sort_by_submission_and_number():
    places = [(1, 1), (1, 2), (1, 10), (1, 999_999_999_999), (2, 1), (10, 1), (999_999, 1)]
    names = [part_name(fence, number, [done(ONE)]) for fence, number in places]
    assert names == sorted(names)
    assert all(name.startswith(PARTS) and name.endswith(".jsonl") for name in names)
    assert PARTS.startswith("_job/")


def test_the_name_of_a_part_says_of_which_items_it_is():
    name = part_name(1, 1, [done(ONE), failed(TWO)])
    assert name == part_name(1, 1, [failed(ONE), done(TWO)])
    others = [
        part_name(1, 1, [done(ONE)]), part_name(1, 1, [done(TWO), done(ONE)]),
        part_name(1, 2, [done(ONE), done(TWO)]), part_name(2, 1, [done(ONE), done(TWO)]),
    ]  # fmt: skip
    assert len({name, *others}) == 5


def test_many_parts_are_all_read_and_progress_is_told(tmp_path):
    folder, told = LocalFolder(tmp_path), []
    keys = [f"{number:032x}" for number in range(300)]
    (tmp_path / PARTS).mkdir(parents=True)
    for number, key in enumerate(keys):
        (tmp_path / part_name(1, number, [done(key)])).write_text(json.dumps(done(key)) + "\n")
    with Records() as records:
        assert records.load(folder, told.append) == 300
        assert {records.status(key) for key in keys} == {"done"}
        assert sum(told) == 300
        assert len(told) > 1


@pytest.mark.parametrize(
    ("first", "then"), [(failed(ONE, 2), failed(ONE, 4)), (failed(ONE), done(ONE)), (done(ONE), done(ONE, seed=1))]
)
@pytest.mark.parametrize("numbers", [(7, 70), (70, 7), (7, 7)])
@pytest.mark.parametrize("loads", [1, 2])
def test_what_a_later_submission_wrote_stands(tmp_path, first, then, numbers, loads):
    folder = LocalFolder(tmp_path)
    with Records() as records:
        write_part(folder, 9, numbers[0], [first, done(TWO)])
        if loads == 2:
            assert records.load(folder) == 1
        write_part(folder, 10, numbers[1], [then])
        records.load(folder)
        assert records.get(ONE) == then
        assert records.get(TWO) == done(TWO)


def test_a_part_that_came_later_is_read_by_loading_again(tmp_path):
    folder = LocalFolder(tmp_path)
    write_part(folder, 1, 1, [done(ONE)])
    with Records() as records:
        assert records.load(folder) == 1
        write_part(folder, 1, 2, [done(TWO)])
        assert records.load(folder) == 1
        assert records.load(folder) == 0
        assert [records.status(key) for key in (ONE, TWO)] == ["done", "done"]


def test_a_chunk_of_which_all_failed_is_read_again_when_it_was_tried_again(tmp_path):
    folder = LocalFolder(tmp_path)
    write_part(folder, 1, 1, [failed(ONE)])
    with Records() as records:
        records.load(folder)
        assert records.status(ONE) == "failed"
        write_part(folder, 2, 1, [done(ONE)])
        records.load(folder)
        assert records.status(ONE) == "done"


def test_a_store_that_goes_away_while_parts_are_read_loses_none(tmp_path):
    # Whoever waits through the outage calls load again.
    for number, key in enumerate((ONE, TWO, THREE)):
        write_part(LocalFolder(tmp_path), 1, number, [done(key)])
    folder = FailingFolder(tmp_path, {"read": [None, StorageError("away", "away")]})
    with Records() as records:
        with pytest.raises(StorageError):
            records.load(folder)
        records.load(folder)
        assert [records.status(key) for key in (ONE, TWO, THREE)] == ["done"] * 3


# ---- one output of several items


def test_an_output_that_another_item_has_made_since_is_not_that_of_the_first_any_more(tmp_path):
    folder = LocalFolder(tmp_path)
    write_part(folder, 1, 1, [done(ONE, output="o.png"), done(THREE)])
    write_part(folder, 2, 1, [done(TWO, output="o.png")])
    with Records() as records:
        records.load(folder)
        assert [records.status(key) for key in (ONE, TWO, THREE)] == ["", "done", "done"]
        write_part(folder, 3, 1, [done(ONE, output="o.png")])
        records.load(folder)
        assert [records.status(key) for key in (ONE, TWO, THREE)] == ["done", "", "done"]


def test_an_item_that_failed_has_made_no_output(tmp_path):
    folder = LocalFolder(tmp_path)
    write_part(folder, 1, 1, [done(ONE, output="o.png")])
    write_part(folder, 2, 1, [failed(TWO, output="o.png")])
    with Records() as records:
        records.load(folder)
        assert [records.status(key) for key in (ONE, TWO)] == ["done", "failed"]
        assert records.get(TWO)["error"]["code"] == "not_found"


def test_what_failed_stays_failed_whoever_made_its_output(tmp_path):
    folder = LocalFolder(tmp_path)
    write_part(folder, 1, 1, [failed(ONE, output="o.png")])
    write_part(folder, 2, 1, [done(TWO, output="o.png")])
    with Records() as records:
        records.load(folder)
        assert [records.status(key) for key in (ONE, TWO)] == ["failed", "done"]


def test_a_local_disk_that_is_full_is_a_storage_error(tmp_path):
    import sqlite3

    class Full:
        def executemany(self, *_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

    with Records() as records:
        table, records._table = records._table, Full()
        with pytest.raises(StorageError, match="database or disk is full; free space there, or set TMPDIR") as caught:
            records.add([done(ONE)])
        records._table = table
    assert caught.value.kind == "full"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"key": "1", "status": "done", "output": "o"', "JSONDecodeError: "),
        (b"\x00\x00\x00", "JSONDecodeError: "),
        (b"caf\xe9", "UnicodeDecodeError: "),
        (b'{"status": "done"}\n', "KeyError: 'key'"),
        (b'{"key": "1"}\n', "KeyError: 'status'"),
        (b'{"key": "1", "status": "done"}\n', "KeyError: 'output'"),
        (b'{"key": "", "status": "done", "output": "o"}\n', "a record without key, output or status"),
        (b'{"key": "1", "status": "begun", "output": "o"}\n', "a record without key, output or status"),
        (b"[1]\n", "TypeError: "),
        (b"7\n", "TypeError: "),
        (b'{"key": "1", "status": "done", "output": "o"}\n\n', "JSONDecodeError: "),
    ],
)
def test_a_damaged_part_is_named_with_what_to_do(tmp_path, data, found):
    folder = LocalFolder(tmp_path)
    write_part(folder, 1, 1, [done(ONE)])
    folder.write(f"{PARTS}x.jsonl", data)
    with Records() as records, pytest.raises(DatasetError) as caught:
        records.load(folder)
    assert str(caught.value).startswith(f"{PARTS}x.jsonl: found {found}")
    assert str(caught.value).endswith("expected records; delete this file and run the same command again")


def test_records_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Records() as records:
        records.add([done(ONE)])
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


# ---- attempts


def test_attempts_are_the_highest_count_of_each_item(folder):
    for key, count in ((ONE, 1), (ONE, 2), (TWO, 4), (ONE, 10), (TWO, 3)):
        note_attempt(folder, key, count)
    assert load_attempts(folder) == {ONE: 10, TWO: 4}


def test_without_attempts_there_are_none(folder):
    assert load_attempts(folder) == {}


def test_files_that_are_no_attempts_are_not_looked_at(tmp_path):
    folder = LocalFolder(tmp_path)
    note_attempt(folder, ONE, 2)
    for name in ("notes.txt", f"{TWO}-", f"{TWO}-x", f"{TWO[:31]}-2", f"{TWO}-2.bak", f"sub/{TWO}-2", TWO):
        folder.write(f"_job/attempts/{name}", b"")
    folder.write(f"_job/other/{THREE}-2", b"")
    assert load_attempts(folder) == {ONE: 2}


def test_noting_an_attempt_twice_is_no_matter(tmp_path):
    note_attempt(LocalFolder(tmp_path), ONE, 2)
    note_attempt(LocalFolder(tmp_path), ONE, 2)
    assert load_attempts(LocalFolder(tmp_path)) == {ONE: 2}
