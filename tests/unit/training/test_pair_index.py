from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ip2p.errors import DatasetError
from ip2p.training.pair_index import Pages, count_rows, list_pairs, read_shard_rows


def test_pairs_of_a_split_are_listed_over_several_runs_in_order(run_uri: str, build_run: Callable[..., str]) -> None:
    other = build_run(range(20, 24))
    shards = list_pairs([run_uri, other])
    found = [record["pair_id"] for shard in shards for record in read_shard_rows(shard)]
    assert found == [f"pair{place:04d}" for place in (0, 1, 3, 4, 5, 7, 8, 9, 11, 20, 21, 23)]
    assert count_rows(shards) == 12
    assert count_rows(list_pairs([run_uri], "val")) == 3


def test_a_split_without_pairs_is_refused_by_name(run_uri: str) -> None:
    with pytest.raises(DatasetError, match=r"no pair of split 'test' in .*run; name run folders"):
        list_pairs([run_uri], "test")
    with pytest.raises(DatasetError, match="no run folder at all"):
        list_pairs([])
    with pytest.raises(DatasetError, match="'validation': there are train, val, test"):
        list_pairs([run_uri], "validation")


def test_a_truncated_shard_is_named_before_training_starts(run_uri: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_uri, tmp_path / "cut"))
    shard = sorted((copy / "pairs").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=rf"{shard.name}: \d+ bytes, the manifest says \d+"):
        list_pairs([str(copy)])


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not the folder of a run"):
        list_pairs([str(tmp_path)])


def pages(budget_bytes: int, lengths: tuple[int, ...] = (3, 2, 4)) -> tuple[Pages[str], list[int]]:
    asked: list[int] = []

    def read(page: int) -> tuple[str, int]:
        asked.append(page)
        return f"page{page}", 10

    return Pages(lengths, read, budget_bytes), asked


def test_rows_are_found_in_their_pages_and_put_back_in_their_places() -> None:
    rows, asked = pages(100)
    indices = np.array([8, 0, 5, 2, 4])
    found = {page: (wanted.tolist(), at.tolist()) for page, wanted, at in rows.find(indices)}
    assert found == {"page0": ([1, 3], [0, 2]), "page1": ([4], [1]), "page2": ([0, 2], [3, 0])}
    assert len(rows) == 9
    assert sorted(asked) == [0, 1, 2]


def test_pages_stay_within_the_budget_and_the_one_used_last_stays() -> None:
    rows, asked = pages(20)
    for index in (0, 3, 0, 5, 0, 3):
        rows.find(np.array([index]))
    assert asked == [0, 1, 2, 1]


def test_a_page_larger_than_the_budget_is_still_kept() -> None:
    rows, asked = pages(1)
    rows.find(np.array([0]))
    rows.find(np.array([1]))
    assert asked == [0]
