from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.errors import DatasetError
from ip2p.models.components import TextToImage
from ip2p.storage import LocalFolder
from ip2p.training import latent_cache
from ip2p.training.draws import draw
from ip2p.training.encoding import PairEncoder
from ip2p.training.latent_cache import CachedRows, cache_identity, cache_shard, plan_parts
from ip2p.training.loss import NoiseSchedule, image_latents, target_latents
from ip2p.training.pair_columns import PictureRows
from ip2p.training.pair_index import ShardRows, count_rows, list_pairs, read_shard_rows
from tests.tiny_pairs import make_cache

Splits = dict[str, list[ShardRows]]


@pytest.fixture(scope="session")
def splits(run_uri: str) -> Splits:
    return {split: list_pairs([run_uri], split) for split in ("train", "val")}


@pytest.fixture(scope="session")
def identity(splits: Splits, model: TextToImage) -> latent_cache.CacheIdentity:
    return cache_identity(splits, model.sha256, 16, mirrored=True)


@pytest.fixture(scope="session")
def cache(
    tmp_path_factory: pytest.TempPathFactory, identity: typing.Any, splits: Splits, encoder: PairEncoder
) -> LocalFolder:
    """Parts of four pairs and more, both splits, mirrored too; not to be written to."""
    folder = LocalFolder(tmp_path_factory.mktemp("cache"))
    make_cache(folder, identity, splits, encoder, pairs_per_part=4)
    return folder


class Never:
    """Stands for an encoder where nothing may be encoded."""

    def __getattr__(self, name: str) -> typing.Any:
        raise AssertionError(f"{name} was asked of an encoder that must not run")


@pytest.mark.parametrize("split", ["train", "val"])
def test_cached_and_fresh_pairs_give_the_same_targets_up_to_fp16(
    cache: LocalFolder, identity: typing.Any, splits: Splits, encoder: PairEncoder, schedule: NoiseSchedule, split: str
) -> None:
    cached, fresh = CachedRows(cache, identity, split), PictureRows(splits[split], encoder, 16)
    assert len(cached) == len(fresh) == {"train": 9, "val": 3}[split]
    assert cached.latent_shape == fresh.latent_shape
    assert torch.allclose(cached.null_state, fresh.null_state, atol=2e-3)
    draws = draw(3, 0, range(24), cached.latent_shape, 0.5)
    indices = np.random.default_rng(0).integers(0, len(cached), 24)
    one, two = (source.rows(indices, draws.flips.numpy()) for source in (cached, fresh))
    for name in vars(one):
        assert torch.allclose(vars(one)[name], vars(two)[name], atol=1e-3, rtol=2e-3), name
    targets = [target_latents(columns, draws.posterior_noise, schedule) for columns in (one, two)]
    assert torch.allclose(*targets, atol=1e-3, rtol=2e-3)
    assert torch.allclose(image_latents(one, schedule), image_latents(two, schedule), atol=1e-3, rtol=2e-3)


def test_mirrored_pairs_are_those_asked_for(cache: LocalFolder, identity: typing.Any) -> None:
    cached, indices = CachedRows(cache, identity), np.array([0, 0, 2])
    columns = cached.rows(indices, np.array([True, False, True]))
    straight = cached.rows(indices, np.zeros(3, bool))
    assert not torch.equal(columns.edited_mean[0], straight.edited_mean[0])
    assert torch.equal(columns.edited_mean[1], straight.edited_mean[1])
    assert columns.edited_mean.dtype == columns.text_states.dtype == torch.float32


def test_an_instruction_that_pairs_share_is_stored_once(splits: Splits, encoder: PairEncoder) -> None:
    records = [record for shard in splits["train"] for record in read_shard_rows(shard)]
    pairs, texts = cache_shard(records, encoder, 16, mirrored=False)
    assert texts["instruction"].to_pylist() == list(dict.fromkeys(record["instruction"] for record in records))
    assert len(texts) == 3 < len(pairs) == 9
    assert pairs.column_names == ["pair_id", "edited_mean", "edited_std", "original_mode", "text"]
    assert pairs["pair_id"].to_pylist() == [record["pair_id"] for record in records]
    assert cache_shard(records, encoder, 16, mirrored=False)[0].equals(pairs)


def test_pairs_beyond_one_vae_call_keep_their_places(
    splits: Splits, encoder: PairEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record for shard in splits["train"] for record in read_shard_rows(shard)]
    whole = cache_shard(records, encoder, 16, mirrored=False)[0]
    monkeypatch.setattr(latent_cache, "ENCODED_TOGETHER", 4)
    pieces = cache_shard(records, encoder, 16, mirrored=False)[0]
    for one, two in zip(whole["edited_mean"].to_pylist(), pieces["edited_mean"].to_pylist(), strict=True):
        assert np.allclose(np.frombuffer(one, np.float16), np.frombuffer(two, np.float16), atol=2e-3)


def test_parts_hold_whole_shards_in_order(splits: Splits) -> None:
    parts = plan_parts(splits["train"], pairs_per_part=4)
    assert [shard for part in parts for shard in part] == splits["train"]
    assert [count_rows(part) for part in parts] == [6, 3]


def test_reading_a_cache_runs_no_encoder_and_making_it_twice_does_not_either(
    cache: LocalFolder, identity: typing.Any, splits: Splits
) -> None:
    before = {name: cache.read(name) for name in cache.list()}
    make_cache(cache, identity, splits, typing.cast(PairEncoder, Never()), pairs_per_part=4)
    CachedRows(cache, identity).rows(np.arange(9), np.zeros(9, bool))
    assert {name: cache.read(name) for name in cache.list()} == before


def test_an_unfinished_cache_is_refused_and_its_parts_are_used_again(
    tmp_path: Path, identity: typing.Any, splits: Splits, encoder: PairEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LocalFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "finish_cache", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_cache(folder, identity, splits, encoder, pairs_per_part=4)
    with pytest.raises(DatasetError, match=r"manifest.json is missing: no finished cache"):
        CachedRows(folder, identity)
    monkeypatch.setattr(latent_cache, "cache_shard", Never())
    make_cache(folder, identity, splits, encoder, pairs_per_part=4)
    assert len(CachedRows(folder, identity)) == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [("vae", "other"), ("text_encoder", "other"), ("resolution", 32), ("mirrored", False), ("pairs", {"train": "x"})],
)
def test_a_cache_of_another_identity_is_refused_by_what_differs(
    cache: LocalFolder, identity: typing.Any, field: str, value: object
) -> None:
    with pytest.raises(DatasetError, match=rf"made for something else \({field} .*wanted .*make it again"):
        CachedRows(cache, dataclasses.replace(identity, **{field: value}))


def test_the_identity_names_rows_and_their_bytes(splits: Splits, model: TextToImage) -> None:
    def of(shards: list[ShardRows]) -> str:
        return cache_identity({"train": shards}, model.sha256, 16, True).pairs["train"]

    first, *rest = splits["train"]
    fewer = dataclasses.replace(first, rows=first.rows[:-1])
    altered = dataclasses.replace(first, entry={**first.entry, "sha256": "0"})
    assert len({of(splits["train"]), of([fewer, *rest]), of([altered, *rest]), of(rest)}) == 4


def test_a_cache_of_another_identity_makes_way_for_the_new_one(
    tmp_path: Path, identity: typing.Any, splits: Splits, encoder: PairEncoder
) -> None:
    folder, plain = LocalFolder(tmp_path), dataclasses.replace(identity, mirrored=False)
    make_cache(folder, identity, splits, encoder)
    former = set(folder.list("train/"))
    make_cache(folder, plain, splits, encoder)
    assert former.isdisjoint(folder.list("train/"))
    cached = CachedRows(folder, plain)
    assert cached.rows(np.arange(9), np.zeros(9, bool)).edited_mean.shape == (9, 4, 8, 8)
    with pytest.raises(DatasetError, match=r"holds no mirrored pictures.*--set flip=0"):
        cached.rows(np.arange(9), np.ones(9, bool))


def test_the_folder_of_a_run_is_never_overwritten_by_a_cache(
    build_run: typing.Callable[..., str], identity: typing.Any, splits: Splits, encoder: PairEncoder
) -> None:
    folder = LocalFolder(Path(build_run(range(4))))
    with pytest.raises(DatasetError, match="not the manifest of a cache"):
        make_cache(folder, identity, splits, encoder)


def test_a_truncated_part_is_named(tmp_path: Path, identity: typing.Any, splits: Splits, encoder: PairEncoder) -> None:
    folder = LocalFolder(tmp_path)
    make_cache(folder, identity, splits, encoder)
    part = next(tmp_path.glob("train/*-pairs.parquet"))
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=rf"{part.name}: \d+ bytes, the manifest says"):
        CachedRows(folder, identity).rows(np.arange(2), np.zeros(2, bool))
    (tmp_path / "manifest.json").write_text(json.dumps({})[:1])
    with pytest.raises(DatasetError, match=r"damaged .*delete this folder"):
        CachedRows(folder, identity)
