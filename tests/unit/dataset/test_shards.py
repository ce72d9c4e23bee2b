"""Shards: planned by the input alone, committed whole, summed up from their stats."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ip2p.config import load_recipe
from ip2p.dataset.contact_sheet import contact_sheet, draw_sheet
from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import iterate_pairs, verify
from ip2p.dataset.shards import (
    WEIGHTS,
    Shard,
    commit_shard,
    finished_shards,
    plan_shards,
    read_stats,
    run_id_of,
    unfinished,
)
from ip2p.dataset.summary import Totals, summary_of
from ip2p.dataset.tables import image_cell
from ip2p.errors import InputError, StorageError
from ip2p.images import decode_image, encode_image
from ip2p.storage import LocalFolder, open_folder
from ip2p.triplets.captions import CaptionRow, as_batch
from tests.ledgers import iterate_ledger

RECIPE = load_recipe("postcard", ["output.prompts_per_shard=3"])


def rows(count: int, start: int = 0) -> list[CaptionRow]:
    return [CaptionRow(i, f"{i:016x}", i + 1, f"a red boat {i}") for i in range(start, start + count)]


def painted(shard) -> dict:
    """What the painter hands on: the first prompt kept one pair of two, the second none, the third was refused."""
    batch = as_batch(shard.rows)
    count = len(batch["prompt_id"])
    columns = {"status": ["accepted", "exhausted", "refused"], "reason": ["", "", "too_long"], "error": ["", "", ""]}
    texts = {name: np.array(values[:count], object) for name, values in columns.items()}
    sims = dict.fromkeys(("sim_original", "sim_edited", "sim_image", "sim_direction"), 0.5)
    drawn = {"seed": 7, "p2p_threshold": 0.5, "guidance_scale": 3.0, **sims}
    candidates, pairs = np.empty(count, object), np.empty(count, object)
    for i in range(count):
        reasons = [["kept", "below_image"], ["below_direction", "not_finite"], []][i]
        candidates[i] = [{**drawn, "reason": reason} for reason in reasons]
        picture = encode_image(np.full((8, 8, 3), int(batch["index"][i]) % 250, np.uint8))
        pair = {"pair_id": f"pair-{batch['prompt_id'][i]}", "rank": 0, **drawn}
        pairs[i] = [{**pair, "original_image": picture, "edited_image": picture}] if i == 0 else []
    evals = np.array([16, 16, 0][:count], np.int64)
    return {
        **batch,
        **texts,
        "candidates": candidates,
        "pairs": pairs,
        "row_evals": evals,
        **dict.fromkeys(WEIGHTS, "w"),
    }


def test_plan_depends_on_the_rows_alone_and_covers_each_once():
    plan = plan_shards(rows(8), RECIPE)
    assert [len(shard.rows) for shard in plan] == [3, 3, 2]
    assert [row.index for shard in plan for row in shard.rows] == list(range(8))
    assert plan == plan_shards(rows(8), RECIPE)
    assert plan[0].name.startswith("part-00000-")
    assert plan[0].name == plan_shards(rows(20), RECIPE)[0].name
    assert plan[0].name != plan_shards(rows(8, start=1), RECIPE)[0].name


def test_only_committed_shards_count_as_finished(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(8), RECIPE)
    assert unfinished(plan, folder) == plan
    commit_shard(folder, plan[1].name, painted(plan[1]), RECIPE, "run")
    assert finished_shards(folder) == {plan[1].name}
    assert unfinished(plan, folder) == [plan[0], plan[2]]


def other_captions(count: int) -> list[CaptionRow]:
    return [dataclasses.replace(row, prompt_id=f"other-{row.index}") for row in rows(count)]


def test_shards_of_other_captions_are_refused_and_stay(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(6), RECIPE)
    commit_shard(folder, plan[0].name, painted(plan[0]), RECIPE, "run")
    with pytest.raises(InputError, match=f"1 shards of other captions .*{plan[0].name}"):
        unfinished(plan_shards(other_captions(6), RECIPE), folder)
    assert finished_shards(folder) == {plan[0].name}


def test_fewer_captions_than_were_worked_on_are_refused(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(9), RECIPE)
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, "run")
    with pytest.raises(InputError, match="1 shards of other captions"):
        unfinished(plan_shards(rows(6), RECIPE), folder)
    assert len(finished_shards(folder)) == 3
    assert unfinished(plan_shards(rows(6), RECIPE), folder, redo_changed=True) == []
    assert finished_shards(folder) == {shard.name for shard in plan[:2]}


def test_mending_a_bad_row_redoes_its_shard_alone(tmp_path):
    folder, all_rows = open_folder(str(tmp_path)), rows(9)
    broken = [row for row in all_rows if row.index != 4]
    plan = plan_shards(broken, RECIPE)
    assert [len(shard.rows) for shard in plan] == [3, 2, 3]
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, "run")
    mended = plan_shards(all_rows, RECIPE)
    assert unfinished(mended, folder) == [mended[1]]
    assert folder.list("ledger/") == [f"ledger/{shard.name}.parquet" for shard in (plan[0], plan[2])]


def test_a_growing_last_shard_is_made_anew(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(5), RECIPE)
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, "run")
    more = plan_shards(rows(8), RECIPE)
    assert unfinished(more, folder) == more[1:]
    assert len(folder.list("pairs/")) == 1


def with_one_more(all_rows: list[CaptionRow], place: int) -> list[CaptionRow]:
    """A caption put in at ``place``: those after it move on by one."""
    new = CaptionRow(place, "new", place + 1, "a new boat")
    later = [dataclasses.replace(row, index=row.index + 1, line=row.line + 1) for row in all_rows[place:]]
    return [*all_rows[:place], new, *later]


def test_an_insertion_that_moves_many_captions_is_refused_and_costs_nothing(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(30), RECIPE)
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, "run")
    write_manifest(folder, {})
    before = folder.list()
    more = plan_shards(with_one_more(rows(30), 18), RECIPE)
    with pytest.raises(InputError, match=f"4 shards of other captions .*{plan[6].name}.*--redo-changed"):
        unfinished(more, folder)
    assert folder.list() == before

    said: list[str] = []
    assert unfinished(more, folder, redo_changed=True, say=said.append) == more[6:]
    assert finished_shards(folder) == {shard.name for shard in plan[:6]}
    assert [line.partition(",")[0] for line in said] == ["4 finished shards hold other captions than now"]
    assert not folder.exists("manifest.json"), "killed now, it would list what is gone"


def test_a_few_changed_shards_are_made_anew_and_said_to_be(tmp_path):
    folder, plan, said = open_folder(str(tmp_path)), plan_shards(rows(30), RECIPE), []
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, "run")
    more = plan_shards(with_one_more(rows(30), 25), RECIPE)
    assert unfinished(more, folder, say=said.append) == more[8:]
    assert len(said) == 1
    assert plan[8].name in said[0]


@pytest.mark.parametrize(("finished", "few"), [(30, 2), (99, 2), (200, 4), (1000, 20)])
def test_how_many_are_a_few_grows_with_the_run(tmp_path, finished, few):
    recipe = load_recipe("postcard", ["output.prompts_per_shard=1"])
    for shard in plan_shards(rows(finished), recipe):
        for file in (f"stats/{shard.name}.json", f"ledger/{shard.name}.parquet", f"pairs/{shard.name}.parquet"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()

    def changed(count: int) -> list[Shard]:
        return plan_shards([*other_captions(count), *rows(finished)[count:]], recipe)

    folder = open_folder(str(tmp_path))
    with pytest.raises(InputError, match=f"{few + 1} shards of other captions"):
        unfinished(changed(few + 1), folder)
    assert unfinished(changed(few), folder) == changed(few)[:few]


def test_where_nothing_is_left_to_go_on_from_nothing_is_redone(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(6), RECIPE)
    commit_shard(folder, plan[0].name, painted(plan[0]), RECIPE, "run")
    with pytest.raises(InputError, match=r"that the run was started with$"):
        unfinished(plan_shards(other_captions(6), RECIPE), folder, redo_changed=True)
    assert finished_shards(folder) == {plan[0].name}


@pytest.mark.parametrize("lost", ["ledger/{}.parquet", "pairs/{}.parquet", "stats/{}.json"])
def test_a_shard_that_lost_a_file_is_made_again(tmp_path, lost):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(6), RECIPE)
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, "run")
    folder.delete(lost.format(plan[1].name))
    assert unfinished(plan, folder) == [plan[1]]


def test_shards_with_errors_say_so(tmp_path):
    folder, (shard,) = open_folder(str(tmp_path)), plan_shards(rows(3), RECIPE)
    assert commit_shard(folder, shard.name, painted(shard), RECIPE, "run").failed == 0
    batch = painted(shard)
    batch["status"] = np.array(["accepted", "error", "error"], object)
    commit_shard(folder, shard.name, batch, RECIPE, "run")
    (stats,) = read_stats(folder, [shard.name])
    assert stats.failed == 2


@pytest.mark.parametrize("retried", [False, True], ids=["new", "retried"])
@pytest.mark.parametrize("stop_before", ["pairs/", "ledger/", "stats/"])
def test_a_shard_that_was_cut_off_is_not_finished_and_is_made_again_with_the_same_bytes(
    tmp_path, monkeypatch, stop_before, retried
):
    plan = plan_shards(rows(3), RECIPE)
    whole = LocalFolder(tmp_path / "whole")
    commit_shard(whole, plan[0].name, painted(plan[0]), RECIPE, "run")
    folder, write = LocalFolder(tmp_path / "cut"), LocalFolder.write
    if retried:  # it is there already, with errors instead of pairs
        failed = {**painted(plan[0]), "status": np.array(["error"] * 3, object), "pairs": [[], [], []]}
        commit_shard(folder, plan[0].name, failed, RECIPE, "run")
        assert unfinished(plan, folder) == []

    def cut(self, name, data):
        if name.startswith(stop_before):
            raise StorageError("the disk is full")
        write(self, name, data)

    monkeypatch.setattr(LocalFolder, "write", cut)
    with pytest.raises(StorageError):
        commit_shard(folder, plan[0].name, painted(plan[0]), RECIPE, "run")
    monkeypatch.undo()
    assert unfinished(plan, folder) == plan
    commit_shard(folder, plan[0].name, painted(plan[0]), RECIPE, "run")
    assert {n: folder.read(n) for n in folder.list()} == {n: whole.read(n) for n in whole.list()}


def test_committed_rows_can_be_read_back_and_summed(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(6), RECIPE)
    for shard in plan:
        commit_shard(folder, shard.name, painted(shard), RECIPE, run_id_of(RECIPE))
    totals = Totals()
    for stats in read_stats(folder, [shard.name for shard in plan]):
        totals.add(stats)
    write_manifest(folder, totals.files)
    assert verify(folder) == []
    sheet = decode_image(contact_sheet(folder, totals.files))
    assert (sheet == 0).all(axis=2).sum() >= 2 * 128 * 128, "the first pair's black pictures are not on the sheet"
    ledger, pairs = list(iterate_ledger(folder)), list(iterate_pairs(folder))
    assert [row["index"] for row in ledger] == list(range(6))
    assert [row["status"] for row in ledger] == ["accepted", "exhausted", "refused"] * 2
    assert [(row["n_candidates"], row["n_kept"]) for row in ledger] == [(2, 1), (2, 0), (0, 0)] * 2
    assert [pair["prompt_id"] for pair in pairs] == [rows(6)[0].prompt_id, rows(6)[3].prompt_id]
    assert pairs[1]["width"] == 8
    assert pairs[1]["p2p_mode"] == "cross"
    assert pairs[1]["unet_sha256"] == "w"
    assert decode_image(pairs[1]["edited_image"]["bytes"])[0, 0, 0] == 3
    summary = summary_of(totals, bad_rows=2, seconds=1.0)
    assert summary == {
        "prompts": 6, "candidates": 8, "kept_pairs": 2, "row_evals": 64, "row_evals_per_kept_pair": 32.0,
        "pass_share": 0.25, "prompts_by_reason": {"accepted": 2, "exhausted": 2, "too_long": 2},
        "kept_by_reason": {"below_direction": 2, "below_image": 2, "kept": 2, "not_finite": 2},
        "bad_input_rows": 2, "seconds": 1.0,
    }  # fmt: skip


def test_stats_hold_no_times(tmp_path):
    folder, plan = open_folder(str(tmp_path)), plan_shards(rows(3), RECIPE)
    commit_shard(folder, plan[0].name, painted(plan[0]), RECIPE, "run")
    stats = json.loads(folder.read(f"stats/{plan[0].name}.json"))
    assert set(stats) == {
        "files", "prompts", "candidates", "kept_pairs", "row_evals", "prompts_by_reason", "candidates_by_reason"
    }  # fmt: skip


def test_contact_sheet_shows_both_pictures_of_each_pair():
    scores = dict.fromkeys(("sim_original", "sim_edited", "sim_image", "sim_direction", "p2p_threshold"), 0.5)
    red = encode_image(np.full((16, 16, 3), (255, 0, 0), np.uint8))
    blue = encode_image(np.full((16, 16, 3), (0, 0, 255), np.uint8))
    pair = {"original_image": image_cell(red), "edited_image": image_cell(blue), "caption": "a" * 300,
            "instruction": "make it blue", **scores}  # fmt: skip
    sheet = decode_image(draw_sheet([pair] * 5))
    assert (sheet == (255, 0, 0)).all(axis=2).sum() == 5 * 128 * 128
    assert (sheet == (0, 0, 255)).all(axis=2).sum() == 5 * 128 * 128
    assert decode_image(draw_sheet([])).std() > 0
