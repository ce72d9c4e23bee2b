from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from ip2p.dataset.manifest import read_manifest, table_files, write_manifest
from ip2p.dataset.run_folder import (
    by_prompt,
    count_pairs,
    iterate_pair_shards,
    iterate_pairs,
    shard_name,
    verify,
    write_shard,
)
from ip2p.dataset.tables import ledger_record
from ip2p.errors import DatasetError
from ip2p.storage import open_folder
from tests.ledgers import iterate_ledger


def rewrite(folder, change_ledger=lambda rows: rows, change_pairs=lambda rows: rows):
    """The run again with other rows, and a manifest that agrees with them."""
    names = [name.split("/")[1] for name in table_files(read_manifest(folder), "ledger")]
    ledgers = [change_ledger(rows) for rows in shards_of(folder, names)]
    pairs = [change_pairs(rows) for rows in iterate_pair_shards(folder)]
    files = {}
    for name, ledger, rows in zip(names, ledgers, pairs, strict=True):
        files |= write_shard(folder, name, ledger, rows)
    write_manifest(folder, files)


def shards_of(folder, names):
    rows = iterate_ledger(folder)
    sizes = [read_manifest(folder)[f"ledger/{name}"]["rows"] for name in names]
    return [list(itertools.islice(rows, size)) for size in sizes]


def test_rows_come_in_shard_order_with_all_prompts_and_pairs(run):
    assert [row["index"] for row in iterate_ledger(run)] == [0, 1, 2, 3, 4]
    assert [pair["index"] for pair in iterate_pairs(run)] == [0, 0, 2, 3, 3, 3, 4]
    assert [len(shard) for shard in iterate_pair_shards(run)] == [2, 4, 1]
    assert count_pairs(run) == 7


def test_a_shard_without_pairs_is_still_a_shard(build_run):
    folder = build_run(kept=(0, 0, 1))
    assert [len(shard) for shard in iterate_pair_shards(folder)] == [0, 1]
    assert verify(folder) == []


def test_one_shard_is_read_at_a_time(run, monkeypatch):
    read = []
    whole = type(run).read
    monkeypatch.setattr(type(run), "read", lambda self, name: read.append(name) or whole(self, name))
    shards = iterate_pair_shards(run)
    next(shards)
    assert [name for name in read if name.startswith("pairs/")] == read[1:] == [sorted(run.list("pairs/"))[0]]


def test_shards_beyond_the_fifth_digit_stay_in_order():
    names = [f"pairs/{shard_name(number, ['x'])}" for number in (99_999, 100_000, 7)]
    assert [name[:17] for name in table_files(dict.fromkeys(names), "pairs")] == [
        "pairs/part-00007-",
        "pairs/part-99999-",
        "pairs/part-100000",
    ]


def test_chosen_columns_leave_the_pictures_out(run):
    assert set(next(iterate_pairs(run, ["prompt_id", "rank"]))) == {"prompt_id", "rank"}


def test_by_prompt_puts_the_best_rank_first():
    rows = [{"prompt_id": "b", "rank": 1}, {"prompt_id": "a", "rank": 0}, {"prompt_id": "b", "rank": 0}]
    groups = by_prompt(rows)
    assert list(groups) == ["b", "a"]
    assert [row["rank"] for row in groups["b"]] == [0, 1]


def test_a_folder_without_manifest_says_unfinished_or_no_run(run, tmp_path):
    run.delete("manifest.json")
    with pytest.raises(DatasetError, match="has not finished; run the same command again"):
        list(iterate_pairs(run))
    assert len(verify(run)) == 1
    assert "has not finished" in verify(run)[0]
    assert "not the folder of a run" in verify(open_folder(str(tmp_path / "elsewhere")))[0]


@pytest.mark.parametrize("text", [b"{", b'{"files": {}}', b'{"schema_version": 1, "files": {"a": {"bytes": 1}}}'])
def test_a_damaged_manifest_is_refused(run, text):
    run.write("manifest.json", text)
    with pytest.raises(DatasetError, match=r"manifest\.json: damaged"):
        read_manifest(run)


def test_a_manifest_of_a_later_version_is_refused(run):
    run.write("manifest.json", run.read("manifest.json").replace(b'"schema_version": 1', b'"schema_version": 2'))
    with pytest.raises(DatasetError, match="schema version 2; this ip2p reads 1"):
        read_manifest(run)


def test_the_manifest_lists_bytes_hash_and_rows(run):
    content = json.loads(run.read("manifest.json"))
    assert content["schema_version"] == 1
    entry = content["files"][sorted(run.list("pairs/"))[1]]
    assert sorted(entry) == ["bytes", "rows", "sha256"]
    assert entry["rows"] == 4
    assert entry["bytes"] == len(run.read(sorted(run.list("pairs/"))[1]))


def test_a_whole_run_has_no_problems(run):
    assert verify(run) == []


def test_a_lost_file_is_named_and_reading_stops_there(run):
    name = sorted(run.list("pairs/"))[1]
    run.delete(name)
    assert [problem for problem in verify(run) if f"{name}: missing" in problem] == verify(run) != []
    with pytest.raises(DatasetError, match="missing, though the manifest lists it"):
        list(iterate_pairs(run))


def test_a_cut_and_an_altered_file_are_told_apart(run):
    first, second = sorted(run.list("pairs/"))[:2]
    run.write(first, run.read(first)[:-1])
    altered = bytearray(run.read(second))
    altered[100] ^= 1
    run.write(second, bytes(altered))
    problems = verify(run)
    assert len(problems) == 2
    assert first in problems[0]
    assert "the manifest says" in problems[0]
    assert second in problems[1]
    assert "SHA-256" in problems[1]
    with pytest.raises(DatasetError, match="the manifest says"):
        list(iterate_pairs(run))


def test_another_listed_file_is_checked_too(run):
    from ip2p.dataset.manifest import file_entry

    write_manifest(run, {**read_manifest(run), "recipe.json": file_entry(b"{}")})
    assert ["recipe.json: missing" in problem for problem in verify(run)] == [True]
    run.write("recipe.json", b"{}")
    assert verify(run) == []


def test_a_file_left_from_another_run_is_named(run):
    run.write("pairs/part-00009-deadbeef.parquet", b"x")
    assert verify(run) == ["pairs/part-00009-deadbeef.parquet: not in the manifest; it is left from another run and is"
                           " not read"]  # fmt: skip


def test_a_half_listed_shard_is_named(run):
    files = read_manifest(run)
    name = table_files(files, "pairs")[0]
    files.pop(name)
    write_manifest(run, files)
    run.delete(name)
    assert ["the manifest does not list it" in problem for problem in verify(run)] == [True]


def test_a_wrong_row_count_in_the_manifest_is_named(run):
    files = read_manifest(run)
    files[table_files(files, "pairs")[1]]["rows"] = 5
    write_manifest(run, files)
    assert ["4 rows, the manifest says 5" in problem for problem in verify(run)] == [True]


def test_kept_counts_that_disagree_are_named(run):
    rewrite(run, change_ledger=lambda rows: [{**row, "n_kept": 9} if row["index"] == 2 else row for row in rows])
    problems = verify(run)
    assert len(problems) == 1
    assert "the ledger says 9 kept pairs, 1 are there" in problems[0]


def test_pairs_without_a_ledger_row_are_named(run):
    rewrite(run, change_ledger=lambda rows: [row for row in rows if row["index"] != 2])
    assert ["has pairs but no ledger row" in problem for problem in verify(run)] == [True]


def test_an_identity_used_twice_is_named_across_shards(run, ledger_row):
    rewrite(run, change_pairs=lambda rows: [{**row, "pair_id": "same"} if row["rank"] == 0 else row for row in rows])
    assert [problem.split(": ", 1)[1] for problem in verify(run)] == ["pair_id same appears twice in the run"] * 3
    extra = write_shard(run, shard_name(9, ["again"]), [ledger_record(ledger_row(1, 0))], [])
    write_manifest(run, {**read_manifest(run), **extra})
    assert sum("prompt_id" in problem and "twice" in problem for problem in verify(run)) == 1


def test_pictures_that_do_not_decode_or_agree_are_named(run):
    def spoil(rows):
        for row in rows:
            if row["index"] == 0 and row["rank"] == 0:
                row["edited_image"]["bytes"] = row["edited_image"]["bytes"][:-60]
            if row["index"] == 2:
                row["width"] = 99
            if row["index"] == 4:
                from ip2p.images import encode_image

                row["original_image"]["bytes"] = encode_image(__import__("numpy").zeros((8, 8, 3), "uint8"))
        return rows

    rewrite(run, change_pairs=spoil)
    problems = verify(run)
    assert len(problems) == 3
    assert "the edited image cannot be decoded" in problems[0]
    assert "pictures are (24, 16) pixels, its row says (99, 16)" in problems[1]
    assert "the original image is (8, 8) pixels and the edited one (24, 16)" in problems[2]


def test_a_table_of_other_columns_is_named(run):
    from ip2p.dataset.manifest import file_entry
    from ip2p.dataset.tables import parquet_bytes, read_parquet_bytes

    name = sorted(run.list("ledger/"))[0]
    data = parquet_bytes(read_parquet_bytes(run.read(name)).drop_columns(["url"]))
    run.write(name, data)
    write_manifest(run, {**read_manifest(run), name: file_entry(data, 2)})
    assert ["its columns are not those" in problem for problem in verify(run)] == [True]


def test_writing_a_shard_again_gives_the_same_bytes(run, build_run, tree_bytes):
    again = build_run("again")
    assert tree_bytes(Path(again.uri)) == tree_bytes(Path(run.uri))
