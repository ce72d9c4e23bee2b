"""Recipes, seeds, storage and pictures: the floor that everything stands on."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from ip2p.config import Pairs, Recipe, check_recipe, known_fields, load_recipe, recipe_from_json
from ip2p.errors import RecipeError, StorageError
from ip2p.images import carried_text, decode_image, encode_image, to_uint8
from ip2p.seeds import derive_seed, stable_id, unit_uniform
from ip2p.storage import LocalFolder, open_folder, read_file


def test_overrides_take_the_type_of_the_field_and_survive_json():
    recipe = load_recipe("postcard", ["pairs.candidates=16", "filter.min_image=0.5", "seed=3", "pairs.p2p_mode=self"])
    assert (recipe.pairs.candidates, recipe.filter.min_image, recipe.seed) == (16, 0.5, 3)
    assert recipe.pairs.p2p_mode == "self"
    assert recipe_from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pairs.candidate=16", "known: seed, models.text_to_image"),
        ("pairs.candidates=many", "pairs.candidates wants int, got 'many'"),
        ("pairs.candidates", "section.field=value"),
        ("name=x", "unknown recipe field 'name'"),
        ("pairs.p2p_mode=sideways", "self, cross or off"),
        ("pairs.original=drawn", "painted or given"),
        ("pairs.steps=1", "at least 2"),
        ("pairs.resolution=60", "multiple of 8"),
        ("pairs.p2p_min=0.95", "min first"),
        ("filter.max_kept=0", "at least 1"),
        ("output.image_format=gif", "png or jpeg"),
        ("triplets.writer=parrot", "lm, http or given"),
        ("models.dtype=int8", "float32, bfloat16 or float16"),
    ],
)
def test_bad_overrides_are_refused_with_what_is_known(override, said):
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        load_recipe("postcard", [override])


def test_steps_are_skipped_of_given_originals_only():
    assert load_recipe("postcard", ["pairs.original=given", "pairs.skip=0.36"]).pairs.skip == 0.36
    for wrong, said in (("pairs.skip=0.36", "set pairs.skip=0"), ("pairs.skip=0.96", "at least one")):
        with pytest.raises(RecipeError, match=said):
            load_recipe("postcard", [wrong])


def test_given_originals_need_a_sampler_with_noise():
    with pytest.raises(RecipeError, match="sampler=euler_ancestral"):
        load_recipe("postcard", ["pairs.original=given", "pairs.sampler=dpmpp_2m"])


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(RecipeError, match="postcard, postcard-corpus, sd15"):
        load_recipe("sd16")


def test_every_listed_field_can_be_set():
    recipe = load_recipe("sd15")
    for path in known_fields(recipe):
        if path == "name":
            continue
        section, _, field = path.rpartition(".")
        value = getattr(getattr(recipe, section) if section else recipe, field)
        assert load_recipe("sd15", [f"{path}={value}"]) == recipe


def test_sd15_has_the_released_values():
    recipe = load_recipe("sd15")
    assert dataclasses.asdict(recipe.filter) == {
        "min_original": 0.2, "min_edited": 0.2, "min_image": 0.7, "min_direction": 0.2, "max_kept": 4
    }  # fmt: skip
    pairs = recipe.pairs
    assert (pairs.candidates, pairs.steps, pairs.sampler, pairs.p2p_mode) == (100, 100, "euler_ancestral", "self")
    assert (pairs.p2p_min, pairs.p2p_max, pairs.guidance_min, pairs.guidance_max) == (0.1, 0.9, 7.5, 15.0)
    assert (recipe.triplets.temperature, recipe.triplets.max_tokens, recipe.triplets.tries) == (0.7, 256, 4)


def test_a_recipe_of_another_version_is_refused():
    with pytest.raises(RecipeError, match="another version"):
        recipe_from_json(load_recipe("postcard").to_json().replace('"candidates"', '"samples"'))


def test_check_recipe_names_the_field():
    with pytest.raises(RecipeError, match=r"pairs\.guidance_min"):
        check_recipe(Recipe("x", pairs=Pairs(guidance_min=9.0, guidance_max=1.0)))


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    seeds = {derive_seed(0, "a", 1), derive_seed(0, "a", 2), derive_seed(0, "b", 1), derive_seed(1, "a", 1)}
    assert len(seeds) == 4
    assert derive_seed("a", "bc") != derive_seed("ab", "c")
    code = "from ip2p.seeds import *; print(derive_seed(0,'a',1), stable_id('x', 2))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == [str(derive_seed(0, "a", 1)), stable_id("x", 2)]


def test_unit_uniform_fills_the_unit_interval_evenly():
    draws = np.array([unit_uniform("u", i) for i in range(4000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, 10, (0, 1))
    assert counts.min() > 330
    assert counts.max() < 470


def test_a_written_file_is_whole_or_absent(tmp_path, monkeypatch):
    folder = LocalFolder(tmp_path)
    folder.write("a/b.bin", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"b\.bin: the disk is full \(needed 3 bytes\); free space and run"):
        folder.write("a/b.bin", b"new")
    monkeypatch.undo()
    assert folder.read("a/b.bin") == b"old"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_a_writer_killed_in_the_middle_leaves_no_name(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from ip2p.storage import LocalFolder\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalFolder(__import__('pathlib').Path(sys.argv[1])).write('x.bin', b'data')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    folder = LocalFolder(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "the kill came too early to leave a partial file"
    assert folder.list() == []
    assert not folder.exists("x.bin")


def test_listing_is_sorted_and_by_prefix(tmp_path):
    folder = LocalFolder(tmp_path)
    for name in ("stats/b.json", "stats/a.json", "pairs/a.parquet", "top.json"):
        folder.write(name, b"1")
    assert folder.list("stats/") == ["stats/a.json", "stats/b.json"]
    assert folder.list("stats/b") == ["stats/b.json"]
    assert folder.list() == ["pairs/a.parquet", "stats/a.json", "stats/b.json", "top.json"]
    assert folder.list("nothing/") == []
    folder.delete("stats/a.json")
    folder.delete("stats/a.json")
    assert folder.list("stats/") == ["stats/b.json"]


def test_storage_errors_name_the_place(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        LocalFolder(tmp_path).read("gone.txt")
    with pytest.raises(StorageError, match="only local paths and s3://"):
        open_folder("gs://bucket/x")
    with pytest.raises(StorageError, match="names no bucket"):
        open_folder("s3://")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        LocalFolder(tmp_path / "file").write("below", b"1")


def test_one_file_is_read_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert read_file(str(tmp_path / "file")) == read_file("file") == b"x"
    with pytest.raises(StorageError, match=r"^/no-such-file-at-the-root: no such file"):
        read_file("/no-such-file-at-the-root")
    for wrong in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(StorageError, match="names no file"):
            read_file(wrong)


def test_s3_folder_behaves_like_a_local_one_and_explains_itself(monkeypatch):
    moto = pytest.importorskip("moto")
    import boto3

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with moto.mock_aws():
        boto3.client("s3").create_bucket(Bucket="bucket")
        folder = open_folder("s3://bucket/run/one")
        folder.write("stats/b.json", b"2")
        folder.write("stats/a.json", b"1")
        folder.write("statistics", b"1")
        assert folder.list("stats/") == ["stats/a.json", "stats/b.json"]
        assert folder.read("stats/b.json") == b"2"
        assert folder.exists("stats/a.json")
        assert not folder.exists("stats/c.json")
        folder.delete("stats/a.json")
        assert folder.list("stats/") == ["stats/b.json"]
        with pytest.raises(StorageError, match="s3://bucket/run/one/gone: no such object"):
            folder.read("gone")
        with pytest.raises(StorageError, match="no such bucket"):
            open_folder("s3://other-bucket/x").write("a", b"1")


def test_an_unreachable_store_says_what_to_check(monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=r"s3://bucket/x/a: cannot reach the store .*AWS_ENDPOINT_URL"):
        open_folder("s3://bucket/x").write("a", b"1")


@pytest.mark.parametrize(("image_format", "quality", "off"), [("png", 95, 0), ("webp", 100, 0), ("jpeg", 95, 6)])
def test_pictures_survive_encoding(image_format, quality, off):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp, (64, 1)).T, np.full((64, 64), 90, np.uint8)], axis=2)
    data = encode_image(picture, image_format, quality)
    assert np.abs(decode_image(data).astype(int) - picture).max() <= off
    assert encode_image(picture, image_format, quality) == data
    assert carried_text(data) == ""
    said = encode_image(picture, image_format, quality, about='{"seed": 7}')
    assert carried_text(said) == '{"seed": 7}'
    assert np.array_equal(decode_image(said), decode_image(data))


def test_an_unknown_picture_format_is_no_silent_png():
    with pytest.raises(ValueError, match="unknown image format 'gif'"):
        encode_image(np.zeros((8, 8, 3), np.uint8), "gif")


def test_float_pictures_are_rounded_not_truncated():
    assert to_uint8(np.array([0.0, 0.5, 0.999, 1.2, -1.0])).tolist() == [0, 128, 255, 255, 0]
