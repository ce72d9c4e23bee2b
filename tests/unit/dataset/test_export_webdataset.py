from __future__ import annotations

import json
import math
import tarfile

import pytest

from ip2p.dataset.export_webdataset import export_webdataset
from ip2p.dataset.manifest import write_manifest
from ip2p.dataset.run_folder import iterate_pairs, shard_name, write_shard
from ip2p.dataset.tables import PAIRS_SCHEMA, ledger_record
from ip2p.errors import DatasetError
from ip2p.storage import open_folder


def read_with_webdataset(folder):
    import webdataset

    files = sorted(str(path) for path in folder.glob("shard-*.tar"))
    return list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))


def test_the_webdataset_library_reads_every_pair_back(run, tmp_path):
    counts = export_webdataset(run, open_folder(str(tmp_path / "wds")), pairs_per_tar=3)
    assert counts == {"prompts": 4, "pairs": 7, "tars": 3}
    samples, pairs = read_with_webdataset(tmp_path / "wds"), list(iterate_pairs(run))
    assert len(samples) == 7
    for sample, pair in zip(samples, pairs, strict=True):
        assert sample["__key__"] == f"{pair['prompt_id']}_{pair['seed']}"
        assert sample["0.png"] == pair["original_image"]["bytes"]
        assert sample["1.png"] == pair["edited_image"]["bytes"]
        scalars = json.loads(sample["json"])
        assert set(scalars) == set(PAIRS_SCHEMA.names) - {"original_image", "edited_image"}
        assert scalars == {name: pair[name] for name in scalars}


def test_tars_are_numbered_and_full_before_the_next(run, tmp_path):
    export_webdataset(run, open_folder(str(tmp_path / "wds")), pairs_per_tar=3)
    sizes = {}
    for path in (tmp_path / "wds").glob("*.tar"):
        with tarfile.open(path) as tar:
            sizes[path.name] = len(tar.getnames())
    assert sizes == {"shard-000000.tar": 9, "shard-000001.tar": 9, "shard-000002.tar": 3}


def test_jpeg_pictures_are_named_jpeg(build_run, tmp_path):
    export_webdataset(build_run(kept=(1,), image_format="jpeg"), open_folder(str(tmp_path / "wds")))
    assert {"0.jpg", "1.jpg"} < set(read_with_webdataset(tmp_path / "wds")[0])


def test_an_unknown_score_is_null(ledger_row, pairs_of, tmp_path):
    folder, row = open_folder(str(tmp_path / "run")), ledger_row(0, 1)
    pairs = [{**pair, "sim_image": math.nan} for pair in pairs_of(row)]
    write_manifest(folder, write_shard(folder, shard_name(0, ["a"]), [ledger_record(row)], pairs))
    export_webdataset(folder, open_folder(str(tmp_path / "wds")))
    text = read_with_webdataset(tmp_path / "wds")[0]["json"].decode()
    assert json.loads(text)["sim_image"] is None
    assert "NaN" not in text


def test_an_id_with_a_dot_is_refused_because_keys_end_at_a_dot(ledger_row, pairs_of, tmp_path):
    folder, row = open_folder(str(tmp_path / "run")), ledger_row(0, 1)
    pairs = [{**pair, "prompt_id": "v1.2"} for pair in pairs_of(row)]
    record = {**ledger_record(row), "prompt_id": "v1.2"}
    write_manifest(folder, write_shard(folder, shard_name(0, ["a"]), [record], pairs))
    with pytest.raises(DatasetError, match=r"'v1\.2': WebDataset keys hold no dot"):
        export_webdataset(folder, open_folder(str(tmp_path / "wds")))


def test_a_picture_of_unknown_format_is_refused(ledger_row, pairs_of, tmp_path):
    folder, row = open_folder(str(tmp_path / "run")), ledger_row(0, 1)
    pairs = [{**pair, "edited_image": {"bytes": b"GIF89a", "path": None}} for pair in pairs_of(row)]
    write_manifest(folder, write_shard(folder, shard_name(0, ["a"]), [ledger_record(row)], pairs))
    with pytest.raises(DatasetError, match="neither PNG, JPEG nor WebP"):
        export_webdataset(folder, open_folder(str(tmp_path / "wds")))


def test_exporting_twice_leaves_the_same_bytes(run, tmp_path, tree_bytes):
    told = []
    for name in ("a", "b", "b"):
        export_webdataset(run, open_folder(str(tmp_path / name)), told.append, pairs_per_tar=4)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    assert told == [4, 3] * 3


def test_a_run_that_kept_nothing_is_refused(build_run, tmp_path):
    with pytest.raises(DatasetError, match="no pair was kept"):
        export_webdataset(build_run(kept=(0,)), open_folder(str(tmp_path / "wds")))
