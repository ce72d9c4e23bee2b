from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ip2p.errors import CheckpointError, StorageError
from ip2p.models import checkpoint
from ip2p.models.checkpoint import (
    check_finite,
    check_safetensors,
    file_sha256,
    find_weights,
    read_manifest,
    verify_manifest,
    weights_sha256,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    save_file({"weight": torch.arange(64.0)}, tmp_path / "unet" / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, {"made_by": "a test"})
    return tmp_path


def weights(folder: Path) -> Path:
    return folder / "unet" / "model.safetensors"


def test_untouched_folder_verifies_and_its_manifest_lists_every_file_sorted(folder: Path) -> None:
    verify_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["files"]) == ["config.json", "unet/model.safetensors"]
    assert manifest["files"]["config.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert manifest["about"] == {"made_by": "a test"}


def test_writing_the_manifest_again_gives_the_same_bytes(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    (folder / ".left-over.partial").write_text("a killed write")
    write_manifest(folder, {"made_by": "a test"})
    assert (folder / "manifest.json").read_bytes() == before


def test_a_write_that_breaks_off_leaves_the_old_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "manifest.json").read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(StorageError):
        write_manifest(folder, {"made_by": "another"})
    assert (folder / "manifest.json").read_bytes() == before


def test_file_that_grew_is_refused_with_both_sizes(folder: Path) -> None:
    (folder / "config.json").write_text("{} ")
    with pytest.raises(CheckpointError, match=r"config\.json: found 3 bytes, expected 2;"):
        verify_manifest(folder)


def test_listed_file_that_the_disk_cannot_give_is_refused_by_name(folder: Path) -> None:
    weights(folder).unlink()
    weights(folder).symlink_to(weights(folder))
    with pytest.raises(CheckpointError, match=r"unet/model\.safetensors: cannot be read \(.+\); run `make weights`"):
        verify_manifest(folder)


def test_truncated_file_is_refused_by_name_with_both_sizes_and_the_remedy(folder: Path) -> None:
    whole = weights(folder).read_bytes()
    weights(folder).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError) as refusal:
        verify_manifest(folder)
    message = str(refusal.value)
    assert "unet/model.safetensors" in message
    assert f"found {len(whole) - 1} bytes, expected {len(whole)}" in message
    assert "make weights" in message


def test_flipped_bit_is_refused_by_name_with_both_digests(folder: Path) -> None:
    expected = file_sha256(weights(folder))
    damaged = bytearray(weights(folder).read_bytes())
    damaged[-1] ^= 1
    weights(folder).write_bytes(damaged)
    os.utime(weights(folder), ns=(1, 1))
    with pytest.raises(CheckpointError, match=rf"unet/model\.safetensors: found sha256 .*expected {expected}"):
        verify_manifest(folder)


def test_absent_file_is_refused_by_name(folder: Path) -> None:
    weights(folder).unlink()
    with pytest.raises(CheckpointError, match=r"unet/model\.safetensors: no such file, expected \d+ bytes; run `make"):
        verify_manifest(folder)


def test_only_the_files_asked_for_are_verified_and_an_unlisted_one_is_refused(folder: Path) -> None:
    weights(folder).unlink()
    verify_manifest(folder, ["config.json"])
    with pytest.raises(CheckpointError, match=r"other\.json: not listed in .*manifest\.json; fetch it"):
        verify_manifest(folder, ["other.json"], remedy="fetch it")


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"a": {"bytes": 1}}}', '{"files": {"a": 1}}'])
def test_unreadable_manifest_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a readable manifest"):
        verify_manifest(folder)


def test_absent_manifest_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: no such file"):
        read_manifest(tmp_path)


def test_a_file_is_hashed_once_while_it_does_not_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint._hashed.cache_clear()
    verify_manifest(folder)
    hashed = checkpoint._hashed.cache_info().misses
    verify_manifest(folder)
    assert checkpoint._hashed.cache_info().misses == hashed == 2


def test_a_file_that_was_replaced_is_hashed_anew_even_at_the_same_clock_time(tmp_path: Path) -> None:
    digests = set()
    for text in ("a", "ab"):
        (tmp_path / "file").write_text(text)
        os.utime(tmp_path / "file", ns=(1, 1))
        digests.add(file_sha256(tmp_path / "file"))
    assert len(digests) == 2


def test_weights_with_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    size = weights(folder).stat().st_size
    weights(folder).write_bytes(weights(folder).read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=f"found {size + 1} bytes, expected {size}"):
        check_safetensors(weights(folder))


def test_weights_that_the_disk_cannot_give_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(.+\); fetch the file again"):
        check_safetensors(tmp_path / "model.safetensors")


def test_bytes_that_are_no_safetensors_file_are_refused_whatever_length_they_seem_to_state(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="found 64 bytes whose safetensors header is unreadable"):
        check_safetensors(tmp_path / "model.safetensors")


def test_note_in_the_header_is_not_taken_for_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_safetensors(tmp_path / "model.safetensors")


def test_weights_cut_short_are_refused_by_their_own_header(folder: Path) -> None:
    whole = weights(folder).read_bytes()
    check_safetensors(weights(folder))
    for kept in (len(whole) - 1, 40, 3, 0):
        weights(folder).write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: found {kept} bytes.* expected .*fetch"):
            check_safetensors(weights(folder))


def test_git_lfs_pointer_is_refused_with_the_command_that_fetches_it(folder: Path) -> None:
    weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        check_safetensors(weights(folder))


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=rf"{name}: found pickled weights.*safe_serialization"):
        find_weights(tmp_path, "model")


def test_pickles_beside_other_safetensors_do_not_hide_which_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"pickle")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"/model\.safetensors: no such file"):
        find_weights(tmp_path, "model")


def test_folder_without_weights_is_refused_by_the_name_that_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        find_weights(tmp_path, "model")


def test_shards_are_found_through_their_index_and_each_is_checked(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        save_file({name: torch.ones(2)}, tmp_path / name)
    index = {"weight_map": {"b": names[1], "a": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = find_weights(tmp_path, "model")
    assert [path.name for path in found.files] == names
    assert weights_sha256(found.files) not in {file_sha256(path) for path in found.files}
    assert weights_sha256(found.files[:1]) == file_sha256(found.files[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        find_weights(tmp_path, "model")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_unreadable_index_of_shards_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: not a readable index of shards"):
        find_weights(tmp_path, "model")


def test_shards_of_the_half_precision_variant_are_found(tmp_path: Path) -> None:
    name = "model.fp16-00001-of-00001.safetensors"
    save_file({"a": torch.ones(2).half()}, tmp_path / name)
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": {"a": name}}))
    found = find_weights(tmp_path, "model")
    assert ([path.name for path in found.files], found.variant) == ([name], "fp16")


@pytest.mark.parametrize("middle", ["", ".fp16"])
def test_one_file_beside_an_index_of_shards_is_refused(tmp_path: Path, middle: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / f"model{middle}.safetensors")
    find_weights(tmp_path, "model")
    index = tmp_path / f"model.safetensors.index{middle}.json"
    index.write_text(json.dumps({"weight_map": {"a": f"model{middle}.safetensors"}}))
    with pytest.raises(CheckpointError, match=rf"{index.name}: found beside model{middle}\.safetensors.*delete the"):
        find_weights(tmp_path, "model")


def test_full_precision_file_is_preferred_to_the_half_precision_variant(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).half()}, tmp_path / "model.fp16.safetensors")
    assert find_weights(tmp_path, "model").variant == "fp16"
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert find_weights(tmp_path, "model").variant is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_tensor_name(value: float) -> None:
    layer = torch.nn.Linear(2, 2)
    check_finite(layer, Path("unet.safetensors"))
    layer.weight.data[0, 0] = value
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: weight has 1 values that are NaN or Inf"):
        check_finite(layer, Path("unet.safetensors"))


def test_buffers_that_are_not_finite_are_refused_too() -> None:
    norm = torch.nn.BatchNorm1d(2)
    check_finite(norm, Path("vae.safetensors"))  # it counts its batches in an integer
    norm.running_var[1] = float("nan")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors: running_var has 1 values"):
        check_finite(norm, Path("vae.safetensors"))
