from __future__ import annotations

import errno
import json
import os
import shutil
import typing
import warnings
from pathlib import Path

import pytest
import torch

from ip2p.errors import CheckpointError, StorageError
from ip2p.storage import LocalFolder, S3Folder
from ip2p.training.checkpoints import Checkpoint, finished_steps, latest_whole, read_checkpoint, save_checkpoint


def checkpoint(step: int, size: int = 8) -> Checkpoint:
    random = torch.Generator().manual_seed(step)
    tensors = {
        group: {name: torch.randn(size, 3, generator=random) for name in ("a", "b", "c")} for group in ("unet", "ema")
    }
    tensors["optimizer_step"] = {"a": torch.tensor(float(step))}
    return Checkpoint(step, {"recipe": {"seed": 1}, "about": {}}, tensors)


def same(one: Checkpoint | None, two: Checkpoint) -> bool:
    assert one is not None
    return (
        (one.step, one.state, one.tensors.keys()) == (two.step, two.state, two.tensors.keys())
        and all(one.tensors[group].keys() == two.tensors[group].keys() for group in one.tensors)
        and all(torch.equal(one.tensors[g][n], two.tensors[g][n]) for g in one.tensors for n in one.tensors[g])
    )


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "checkpoints")


def test_some_groups_can_be_read_without_the_others(folder: LocalFolder) -> None:
    save_checkpoint(folder, checkpoint(3), keep=1)
    group, *others = checkpoint(3).tensors
    for other in others:
        for name in folder.list(f"step-00000003/{other}-"):
            folder.write(name, b"damaged")
    read = latest_whole(folder, groups=(group,))
    assert read is not None
    assert list(read.tensors) == [group]
    assert read.state == checkpoint(3).state
    assert all(torch.equal(value, read.tensors[group][name]) for name, value in checkpoint(3).tensors[group].items())
    assert others


def names(folder: LocalFolder) -> list[str]:
    return sorted(path.name for path in folder.root.iterdir())


@pytest.mark.parametrize("part_bytes", [10, 100, 2**30])
def test_what_was_saved_is_read_back_in_parts_of_any_size(folder: LocalFolder, part_bytes: int) -> None:
    save_checkpoint(folder, checkpoint(1000), keep=2, part_bytes=part_bytes)
    assert same(latest_whole(folder), checkpoint(1000))
    parts = folder.list("step-00001000/unet-")
    assert len(parts) == {10: 3, 100: 3, 2**30: 1}[part_bytes]
    assert names(folder) == ["step-00001000"]


def test_tensors_in_another_memory_order_keep_their_numbers(folder: LocalFolder) -> None:
    weight = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    save_checkpoint(folder, Checkpoint(1, {}, {"unet": {"w": weight}}), keep=1)
    assert torch.equal(read_checkpoint(folder, 1).tensors["unet"]["w"], weight)


def test_only_the_last_ones_are_kept(folder: LocalFolder) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(folder, checkpoint(step), keep=2)
    assert names(folder) == ["step-00000030", "step-00000040"]
    assert finished_steps(folder) == [30, 40]


def test_a_checkpoint_of_a_past_that_was_given_up_goes(folder: LocalFolder) -> None:
    for step in (10, 30):
        save_checkpoint(folder, checkpoint(step), keep=1 if step == 10 else 2)
    save_checkpoint(folder, checkpoint(20), keep=1)
    assert finished_steps(folder) == [20]


def test_nothing_saved_is_no_checkpoint(folder: LocalFolder) -> None:
    assert latest_whole(folder) is None


@pytest.mark.parametrize(
    ("file", "harm", "finding"),
    [
        ("unet-000.safetensors", lambda data: data[:-1], r"found \d+ bytes, expected \d+"),
        ("ema-000.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "found sha256 .* expected"),
        ("state.json", lambda data: b"{}", "found 2 bytes"),
        ("manifest.json", lambda data: data[:20], "not a readable manifest"),
        ("manifest.json", lambda data: b'{"files": {}}', "not the manifest of a checkpoint"),
        ("optimizer_step-000.safetensors", None, "no such file"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    folder: LocalFolder, file: str, harm: typing.Callable[[bytes], bytes] | None, finding: str
) -> None:
    for step in (10, 20):
        save_checkpoint(folder, checkpoint(step), keep=2)
    path = folder.root / "step-00000020" / file
    path.write_bytes(harm(path.read_bytes())) if harm else path.unlink()
    with pytest.warns(RuntimeWarning, match=rf"step-00000020/{file}: {finding}.*going back to the checkpoint before"):
        found = latest_whole(folder)
    assert same(found, checkpoint(10))


def test_where_all_are_damaged_nothing_starts_over_by_itself(folder: LocalFolder) -> None:
    for step in (10, 20):
        save_checkpoint(folder, checkpoint(step), keep=2)
        (folder.root / f"step-{step:08d}" / "state.json").write_text("{}")
    with (
        pytest.warns(RuntimeWarning, match="going back"),
        pytest.raises(CheckpointError, match=r"none of 2 checkpoints is whole .*step-00000020.*start over"),
    ):
        latest_whole(folder)


def test_a_save_that_was_killed_is_invisible_and_cleared_by_the_next_one(folder: LocalFolder) -> None:
    save_checkpoint(folder, checkpoint(10), keep=2)
    shutil.copytree(folder.root / "step-00000010", folder.root / "step-00000020")
    (folder.root / "step-00000020" / "manifest.json").unlink()
    (folder.root / "step-00000020" / ".abc.partial").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(latest_whole(folder), checkpoint(10))
    save_checkpoint(folder, checkpoint(30), keep=2)
    assert names(folder) == ["step-00000010", "step-00000030"]


def test_a_save_over_a_killed_save_of_the_same_step_is_whole(folder: LocalFolder) -> None:
    folder.write("step-00000010/unet-007.safetensors", b"left over")
    save_checkpoint(folder, checkpoint(10), keep=2)
    assert same(latest_whole(folder), checkpoint(10))
    assert not folder.exists("step-00000010/unet-007.safetensors")


@pytest.mark.parametrize("full_at", [1, 3, 5])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    save_checkpoint(folder, checkpoint(10), keep=1)
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += os.fstat(handle).st_size > 0 and not os.path.isdir(f"/proc/self/fd/{handle}")  # noqa: PTH112
        if calls >= full_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match="the disk is full"):
            save_checkpoint(folder, checkpoint(20), keep=1)
    assert same(latest_whole(folder), checkpoint(10))
    assert names(folder) == ["step-00000010"]


def test_a_removal_that_breaks_off_leaves_no_damaged_checkpoint(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(folder, checkpoint(10), keep=1)
    deleted: list[str] = []

    def delete(name: str) -> None:
        deleted.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, checkpoint(20), keep=1)
    assert deleted == ["step-00000010/manifest.json"]
    assert finished_steps(folder)[-1] == 20


def test_a_place_that_cannot_be_reached_is_not_taken_for_a_damaged_checkpoint(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save_checkpoint(folder, checkpoint(step), keep=2)

    def read(name: str) -> bytes:
        raise StorageError(f"{name}: cannot reach the store")

    monkeypatch.setattr(folder, "read", read)
    with pytest.raises(StorageError, match="cannot reach"):
        latest_whole(folder)


def test_checkpoints_live_on_s3_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="runs")
        folder = S3Folder("runs", "edit/one")
        for step in (10, 20, 30):
            save_checkpoint(folder, checkpoint(step), keep=2)
        assert finished_steps(folder) == [20, 30]
        assert {name.split("/")[0] for name in folder.list()} == {"step-00000020", "step-00000030"}
        folder.write("step-00000030/state.json", b"{}")
        with pytest.warns(RuntimeWarning, match="s3://runs/edit/one/step-00000030/state.json"):
            assert same(latest_whole(folder), checkpoint(20))


def test_the_manifest_lists_every_file(folder: LocalFolder) -> None:
    save_checkpoint(folder, checkpoint(10), keep=1)
    listed = json.loads(folder.read("step-00000010/manifest.json"))["files"]
    there = {name.split("/")[1] for name in folder.list("step-00000010/")}
    assert listed.keys() | {"manifest.json"} == there
