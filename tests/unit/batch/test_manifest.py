"""Manifests of every kind, prefixes and OpenAI's lines: what becomes an item, and which line is left out and why."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import typing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_batch import file_of, pixels

from ip2p.batch.item import EditSettings, Item
from ip2p.batch.manifest import Rejected, Source, answers_openai, entries, kept
from ip2p.errors import InputError, StorageError
from ip2p.storage import LocalFolder, open_folder

Rows = list[dict[str, typing.Any]]


def written(path: Path, lines: typing.Iterable[object]) -> Source:
    """A .jsonl file; a line that is text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return Source(str(path))


def write_as(kind: str, path: Path, rows: Rows) -> Source:
    """All rows have the same fields."""
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        written(path, rows)
    return Source(str(path))


def items_of(source: Source) -> list[Item]:
    """Of a source whose lines can all be used."""
    found = list(entries(source))
    assert [entry for entry in found if isinstance(entry, Rejected)] == []
    return typing.cast(list[Item], found)


def rejected_in(source: Source) -> list[Rejected]:
    return [entry for entry in entries(source) if isinstance(entry, Rejected)]


def rows(count: int) -> Rows:
    return [{"id": f"item-{number}", "image": f"{number}.png", "instruction": f"make it {number}"} for number in
            range(1, count + 1)]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_each_format_gives_the_same_items(tmp_path, kind):
    asked = [
        {"image": "a.png", "instruction": "one, two", "steps": 5, "guidance_scale": 7.5, "restore_size": True},
        {"image": "b.png", "instruction": "three", "steps": 6, "guidance_scale": 3.0, "restore_size": False},
    ]
    items = items_of(write_as(kind, tmp_path / f"m.{kind}", asked))
    assert [item.line for item in items] == ([2, 3] if kind == "csv" else [1, 2])
    assert [item.image for item in items] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert [item.instruction for item in items] == ["one, two", "three"]
    assert [item.settings for item in items] == [
        EditSettings(steps=5, guidance_scale=7.5, restore_size=True), EditSettings(steps=6, guidance_scale=3.0)
    ]  # fmt: skip
    jsonl = items_of(write_as("jsonl", tmp_path / "same.jsonl", asked))
    assert [item.key("m") for item in items] == [item.key("m") for item in jsonl]


def test_a_text_file_is_a_list_of_pictures_with_one_instruction(tmp_path):
    (tmp_path / "m.txt").write_text("a.png\ns3://bucket/b.png\r\n  /in/c.png\n")
    items = items_of(Source(str(tmp_path / "m.txt"), instruction="make it night"))
    assert [item.image for item in items] == [f"{tmp_path}/a.png", "s3://bucket/b.png", "/in/c.png"]
    assert {item.instruction for item in items} == {"make it night"}
    assert [entry.message[:14] for entry in rejected_in(Source(str(tmp_path / "m.txt")))] == ["no instruction"] * 3


def test_a_blank_line_of_a_text_file_is_rejected(tmp_path):
    (tmp_path / "m.txt").write_text("a.png\n\nb.png\n")
    found = list(entries(Source(str(tmp_path / "m.txt"), instruction="make it night")))
    assert [entry.line for entry in found] == [1, 2, 3]
    assert [type(entry) for entry in found] == [Item, Rejected, Item]
    assert "no image" in found[1].message


@pytest.mark.parametrize("blank", [" ", "\t", " \n"])
@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_picture_of_spaces_is_one_that_is_not_there(tmp_path, name, blank):
    row = {"image": "/a.png", "instruction": "x", name: blank}
    (entry,) = entries(written(tmp_path / "m.jsonl", [row]))
    if name == "image":
        assert isinstance(entry, Rejected)
        assert "no image" in entry.message
    else:
        assert entry.mask == ""


def test_holes_in_a_parquet_column_are_fields_left_out(tmp_path):
    table = {
        "image": ["a.png", "b.png"], "instruction": ["x", "y"], "steps": [None, 7], "seed": [1.0, None],
        "size": [None, "64x64"], "restore_size": [True, None],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    one, two = items_of(Source(str(tmp_path / "m.parquet")))
    assert one.settings == EditSettings(seed=1, restore_size=True)
    assert two.settings == EditSettings(steps=7, size="64x64")


def test_not_a_number_in_a_parquet_column_costs_only_its_row(tmp_path):
    table = {"image": ["a.png", "b.png"], "instruction": ["x", "y"], "guidance_scale": [float("nan"), 2.0]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    bad, good = entries(Source(str(tmp_path / "m.parquet")))
    assert bad == Rejected(1, "guidance_scale must be a number from 0 to 1000, got 'nan'")
    assert good.settings.guidance_scale == 2.0


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_an_image_column_is_one_error(tmp_path, kind):
    source = write_as(kind, tmp_path / f"m.{kind}", [{"picture": "a.png", "instruction": "x"}])
    with pytest.raises(InputError, match=rf"m\.{kind}: no column image; it has: 'picture', 'instruction'"):
        list(entries(source))


def test_a_file_of_another_kind_or_none_is_one_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read rows from \.yaml"):
        list(entries(Source("m.yaml")))
    with pytest.raises(StorageError, match="no such file"):
        list(entries(Source(str(tmp_path / "m.jsonl"))))
    with pytest.raises(InputError, match="one JSON array"):
        list(entries(written(tmp_path / "a.jsonl", [[{"image": "a.png"}]])))


def test_an_empty_manifest_has_no_items(tmp_path):
    assert list(entries(written(tmp_path / "m.jsonl", []))) == []


# ---- places of pictures


def test_a_relative_picture_lies_beside_a_local_manifest(tmp_path, monkeypatch):
    source = written(tmp_path / "m.jsonl", [{"image": "in/a.png", "mask": "in/m.png", "instruction": "x"}])
    for one in (source, dataclasses.replace(source, uri="m.jsonl"), dataclasses.replace(source, uri="./m.jsonl")):
        monkeypatch.chdir(tmp_path)
        (item,) = items_of(one)
        assert (item.image, item.mask) == (f"{tmp_path}/in/a.png", f"{tmp_path}/in/m.png")


def test_a_relative_picture_lies_beside_a_manifest_in_the_folder_above(tmp_path, monkeypatch):
    written(tmp_path / "m.jsonl", [{"image": "a.png", "instruction": "x"}])
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    (item,) = items_of(Source("../m.jsonl"))
    assert Path(item.image).resolve() == tmp_path / "a.png"


@pytest.mark.service
def test_a_relative_picture_lies_beside_a_manifest_on_s3(s3_uri):
    lines = [{"image": image, "instruction": "x"} for image in ("in/a.png", "s3://other/b.png", "/c.png")]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    open_folder(s3_uri).write("m.jsonl", data)
    open_folder(s3_uri).write("m.txt", b"a.png\n")
    assert [item.image for item in items_of(Source(f"{s3_uri}/m.jsonl"))] == [
        f"{s3_uri}/in/a.png", "s3://other/b.png", "/c.png"
    ]  # fmt: skip
    (item,) = items_of(Source(f"{s3_uri}/m.txt", instruction="x"))
    assert item.image == f"{s3_uri}/a.png"


@pytest.mark.parametrize("image", ["/in/a.png", "s3://bucket/a.png", "data:image/png;base64,AA=="])
def test_a_picture_whose_whole_place_is_named_stays_there(tmp_path, image):
    (item,) = items_of(written(tmp_path / "m.jsonl", [{"image": f" {image} ", "instruction": "x"}]))
    assert item.image == image


@pytest.mark.parametrize("image", ["../a.png", "in/../../a.png", "http://host/a.png", "file:///a.png", "gs://b/a.png"])
def test_a_picture_elsewhere_is_rejected(tmp_path, image):
    (entry,) = rejected_in(written(tmp_path / "m.jsonl", [{"id": "i", "image": image, "instruction": "x"}]))
    assert entry.message.startswith("image: ")
    assert entry.id == "i"


# ---- lines that cannot be used


@pytest.mark.parametrize(
    ("line", "said", "named"),
    [
        ('{"image": "a.png"', "broken JSON: ", ""),
        ("", "blank line", ""),
        ('["a.png"]', "not a JSON object but list", ""),
        ({"id": "x", "image": "a.png"}, "no instruction; ", "x"),
        ({"id": "x", "instruction": "x"}, "no image; ", "x"),
        ({"id": "x", "image": "a.png", "instruction": "x", "seed": -1}, "seed must be a whole number", "x"),
        ({"id": "x", "image": "a.png", "instruction": "x", "title": "t"}, "unknown field 'title'; known: id, ", "x"),
        ({"id": 5, "image": "a.png"}, "no instruction; ", ""),
        ({"id": "item-3", "image": "x.png"}, "no instruction; ", "item-3"),
        ({"id": "item-3", "image": "x.png", "instruction": "x"}, "output 'item-3.png' is that of line 3", "item-3"),
    ],
)  # fmt: skip
def test_bad_line_17_of_20_costs_only_itself(tmp_path, line, said, named):
    lines = rows(20)
    found = list(entries(written(tmp_path / "b.jsonl", [*lines[:16], line, *lines[17:]])))
    assert [entry.line for entry in found] == list(range(1, 21))
    (bad,) = [entry for entry in found if isinstance(entry, Rejected)]
    assert (bad.line, bad.id) == (17, named)
    assert bad.message.startswith(said)
    mended = list(entries(written(tmp_path / "b.jsonl", lines)))
    assert [entry for entry in mended if entry.line != 17] == [entry for entry in found if entry.line != 17]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_bad_row_17_of_20_of_a_table_costs_only_itself(tmp_path, kind):
    asked = [{**row, "seed": "many" if number == 17 else str(number)} for number, row in enumerate(rows(20), 1)]
    found = list(entries(write_as(kind, tmp_path / f"m.{kind}", asked)))
    assert [entry.line for entry in found if isinstance(entry, Rejected)] == [17 + (kind == "csv")]
    assert [entry.settings.seed for entry in found if isinstance(entry, Item)] == [
        number for number in range(1, 21) if number != 17
    ]


def test_bytes_that_are_no_text_cost_only_their_line(tmp_path):
    data = b'{"image": "a.png", "instruction": "caf%s"}\n'
    (tmp_path / "m.jsonl").write_bytes(data % b"e" + data % b"\xe9" + data % b"es")
    found = list(entries(Source(str(tmp_path / "m.jsonl"))))
    assert found[1] == Rejected(2, "instruction is not valid UTF-8")
    assert [type(entry) for entry in found] == [Item, Rejected, Item]


def test_of_lines_with_one_output_the_first_is_taken_and_all_others_are_rejected(tmp_path):
    lines = [
        {"id": "a", "image": "a.png", "instruction": "x", "output": "o.png"},
        {"id": "b", "image": "b.png", "instruction": "y"},
        {"id": "c", "image": "c.png", "instruction": "z", "output": "o.png"},
        {"id": "d", "image": "d.png", "instruction": "z", "output": "b.png"},
        {"id": "e", "image": "d.png", "instruction": "z", "output": "o.png"},
        {"id": "b/", "image": "d.png", "instruction": "z", "output": "O.png"},
    ]
    found = list(entries(written(tmp_path / "m.jsonl", lines)))
    assert [entry for entry in found if isinstance(entry, Rejected)] == [
        Rejected(3, "output 'o.png' is that of line 1 already", "c"),
        Rejected(4, "output 'b.png' is that of line 2 already", "d"),
        Rejected(5, "output 'o.png' is that of line 1 already", "e"),
    ]


def test_the_same_line_twice_is_done_once(tmp_path):
    line = {"image": "a.png", "instruction": "x"}
    found = list(entries(written(tmp_path / "m.jsonl", [line, line])))
    assert [type(entry) for entry in found] == [Item, Rejected]


def test_a_rejected_line_does_not_take_an_output(tmp_path):
    lines = [{"id": "a", "image": "a.png"}, {"id": "a", "image": "a.png", "instruction": "x"}]
    assert [type(entry) for entry in entries(written(tmp_path / "m.jsonl", lines))] == [Rejected, Item]


def test_a_manifest_can_be_read_again_and_says_the_same(tmp_path):
    source = written(tmp_path / "m.jsonl", [*rows(3), rows(1)[0], "broken"])
    assert list(entries(source)) == list(entries(source))


# ---- fields that are not looked at


def test_ignored_fields_are_not_looked_at(tmp_path):
    rows = [{"image": "a.png", "instruction": "x", "title": 5, "seed": "many"}]
    source = written(tmp_path / "m.jsonl", rows)
    assert len(rejected_in(source)) == 1
    (item,) = items_of(dataclasses.replace(source, ignore=("title", "seed", "not there")))
    assert item.settings.seed is None
    (entry,) = rejected_in(dataclasses.replace(source, ignore=("title", "seed", "image")))
    assert "no image" in entry.message


def test_ignored_columns_are_not_looked_at(tmp_path):
    source = write_as("csv", tmp_path / "m.csv", [{"image": "a.png", "instruction": "x", "title": "t"}])
    assert len(items_of(dataclasses.replace(source, ignore=("title",)))) == 1


def test_what_a_line_leaves_out_is_that_of_the_source(tmp_path):
    lines = [{"image": "a.png"}, {"image": "b.png", "edit": "my own", "steps": 3}]
    source = dataclasses.replace(
        written(tmp_path / "m.jsonl", lines), instruction="make it night", settings=EditSettings(steps=9, seed=4)
    )
    one, two = items_of(source)
    assert (one.instruction, one.settings) == ("make it night", EditSettings(steps=9, seed=4))
    assert (two.instruction, two.settings) == ("my own", EditSettings(steps=3, seed=4))


# ---- all pictures below a prefix


def prefix(folder: str, **more: typing.Any) -> Source:
    return Source(folder, is_prefix=True, instruction="make it night", **more)


def test_all_pictures_below_a_prefix_are_items_in_the_order_of_their_names(folder):
    for name in ("b.JPG", "a.png", "deep/er/c.webp", "d.jpeg", "notes.txt", "png", ".png", "e.gif", "deep/a.png.bak"):
        folder.write(f"in/{name}", name.encode())
    folder.write("inner/x.png", b"")
    uri = f"{folder.uri}/in"
    items = items_of(prefix(uri))
    assert [item.id for item in items] == ["a.png", "b.JPG", "d.jpeg", "deep/er/c.webp"]
    assert [item.line for item in items] == [1, 2, 3, 4]
    assert [item.image for item in items] == [f"{uri}/{item.id}" for item in items]
    assert [item.output for item in items] == ["a.png", "b.png", "d.png", "deep/er/c.png"]
    assert {item.instruction for item in items} == {"make it night"}
    assert items_of(prefix(f"{uri}/")) == items


def test_a_prefix_knows_the_versions_of_its_pictures(folder):
    folder.write("in/a.png", b"one")
    folder.write("in/b.png", b"two")
    before = items_of(prefix(f"{folder.uri}/in"))
    assert [item.version for item in before] == [version for _, version in folder.versions("in/")]
    folder.write("in/b.png", b"other")
    after = items_of(prefix(f"{folder.uri}/in"))
    assert [one.key("m") == other.key("m") for one, other in zip(before, after, strict=True)] == [True, False]


def test_the_settings_of_a_prefix_are_those_of_all_its_pictures(tmp_path):
    LocalFolder(tmp_path).write("a.b.png", b"")
    settings = EditSettings(steps=3, output_format="jpeg")
    (item,) = items_of(prefix(str(tmp_path), settings=settings))
    assert item.settings == settings
    assert item.output == "a.b.jpg"


def test_of_two_pictures_with_one_output_the_second_is_rejected(tmp_path):
    for name in ("a.jpg", "a.png", "b/a.webp"):
        LocalFolder(tmp_path).write(name, b"")
    one, two, three = entries(prefix(str(tmp_path)))
    assert (one.id, three.id) == ("a.jpg", "b/a.webp")
    assert two == Rejected(2, "output 'a.png' is that of line 1 already", "a.png")


def test_an_empty_prefix_has_no_items(folder):
    assert list(entries(prefix(folder.uri))) == []


def test_pictures_below_a_prefix_have_seeds_of_their_own_that_do_not_change(tmp_path):
    for name in ("a.png", "b.png"):
        LocalFolder(tmp_path).write(name, b"")
    one, two = items_of(prefix(str(tmp_path)))
    assert one.seed != two.seed
    LocalFolder(tmp_path).write("0.png", b"")
    assert items_of(prefix(str(tmp_path)))[1].seed == one.seed


def test_a_picture_with_a_file_name_that_is_no_text_costs_only_itself(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"")
    found = list(entries(prefix(str(tmp_path))))
    assert [type(entry) for entry in found] == [Item, Rejected]


@pytest.mark.parametrize("name", ["_job/a.png", "contact_sheet.png"])
def test_a_picture_whose_output_would_be_a_batchs_own_file_is_rejected(tmp_path, name):
    LocalFolder(tmp_path).write(name, b"")
    assert [type(entry) for entry in entries(prefix(str(tmp_path)))] == [Rejected]


@pytest.mark.parametrize("name", ["../../out.png", "/etc/a.png"])
def test_an_object_whose_output_would_leave_the_folder_is_rejected(monkeypatch, name):
    class Store:
        """S3 takes every name; the tests' own server does not."""

        def versions(self, prefix: str = ""):
            yield name, "v"

    monkeypatch.setattr("ip2p.batch.manifest.open_folder", lambda uri: Store())
    assert [type(entry) for entry in entries(prefix("s3://bucket/in"))] == [Rejected]


# ---- as it is now


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_manifest_that_is_kept_stays_as_it_was(folder, tmp_path, kind):
    write_as(kind, tmp_path / f"m.{kind}", rows(3))
    folder.write(f"in/M.{kind.upper()}", (tmp_path / f"m.{kind}").read_bytes())
    source = Source(f"{folder.uri}/in/M.{kind.upper()}")
    before = items_of(source)
    (tmp_path / "here").mkdir()
    now = kept(source, tmp_path / "here")
    folder.delete(f"in/M.{kind.upper()}")
    assert items_of(now) == before
    assert before[0].image == f"{folder.uri}/in/1.png"
    assert (now.uri, now.instruction) == (source.uri, source.instruction)


def test_errors_of_a_manifest_that_is_kept_name_the_manifest(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    (tmp_path / "here").mkdir()
    now = kept(Source(str(tmp_path / "m.parquet")), tmp_path / "here")
    with pytest.raises(InputError) as caught:
        list(entries(now))
    assert str(caught.value).startswith(f"{tmp_path}/m.parquet: not a whole Parquet file")
    assert "here" not in str(caught.value)
    write_as("csv", tmp_path / "m.csv", [{"picture": "a.png"}])
    with pytest.raises(InputError, match=rf"^{tmp_path}/m\.csv: no column image"):
        list(entries(kept(Source(str(tmp_path / "m.csv")), tmp_path / "here")))


def test_pictures_below_a_prefix_that_is_kept_stay_as_they_were_listed(folder, tmp_path):
    for name in ("b.jpg", "a.png", "c.txt", "é\u2028.webp"):
        folder.write(f"in/{name}", name.encode())
    source = prefix(f"{folder.uri}/in/")
    before = items_of(source)
    now = kept(source, tmp_path)
    folder.write("in/0.png", b"")
    folder.delete("in/a.png")
    assert items_of(now) == before
    assert [item.id for item in before] == ["a.png", "b.jpg", "é\u2028.webp"]


def test_a_manifest_that_cannot_be_read_is_not_kept(folder, tmp_path):
    with pytest.raises(StorageError) as caught:
        kept(Source(f"{folder.uri}/gone.jsonl"), tmp_path)
    assert caught.value.kind == "missing"


def test_whether_a_manifest_that_is_kept_is_openais_is_known_too(tmp_path):
    (tmp_path / "here").mkdir()
    source = written(tmp_path / "m.jsonl", [openai_line()])
    now = kept(source, tmp_path / "here")
    (tmp_path / "m.jsonl").unlink()
    assert answers_openai(now)
    assert len(items_of(now)) == 1


# ---- OpenAI's lines


def openai_line(**body: object) -> dict[str, object]:
    asked = {"prompt": "make it night", "images": [{"image_url": "s3://b/a.png"}], **body}
    return {
        "custom_id": "one", "method": "POST", "url": "/v1/images/edits",
        "body": {name: value for name, value in asked.items() if value != "left out"},
    }  # fmt: skip


def test_a_line_of_openai_is_an_item(tmp_path):
    line = openai_line(
        model="gpt-image-1", user="me", n=1, response_format="b64_json", background="auto", quality="auto",
        size="64x64", output_format="webp", seed=3, num_inference_steps=7, guidance_scale=2.5,
        mask={"image_url": "m.png"},
    )  # fmt: skip
    (item,) = items_of(written(tmp_path / "m.jsonl", [line]))
    wanted = EditSettings(steps=7, guidance_scale=2.5, seed=3, size="64x64", output_format="webp")
    assert item == Item(1, "one", "s3://b/a.png", "make it night", "one.webp", wanted, mask=f"{tmp_path}/m.png")


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize(
    "wrapped",
    [
        "in/a.png",
        ["in/a.png"],
        {"image_url": "in/a.png"},
        [{"image_url": "in/a.png"}],
        {"image_url": {"url": "in/a.png"}},
        [{"type": "input_image", "image_url": {"url": "in/a.png", "detail": "high"}}],
    ],
)
def test_the_picture_is_found_however_it_is_wrapped(tmp_path, name, wrapped):
    line = openai_line(**{"images": "left out", name: wrapped})
    (item,) = items_of(written(tmp_path / "m.jsonl", [line]))
    assert item.image == f"{tmp_path}/in/a.png"


def test_a_picture_may_be_in_the_line_itself(tmp_path):
    import base64

    uri = f"data:image/png;base64,{base64.b64encode(file_of(pixels())).decode()}"
    (item,) = items_of(written(tmp_path / "m.jsonl", [openai_line(images=[{"image_url": uri}])]))
    assert item.image == uri


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"images": []}, "images holds 0 pictures; one is edited at a time"),
        ({"images": ["a.png", "b.png"]}, "images holds 2 pictures; one is edited at a time"),
        ({"images": [{"file_id": "f"}]}, "images has no image_url; files that were uploaded elsewhere are not here"),
        ({"mask": {"file_id": "f"}}, "mask has no image_url"),
        ({"images": [{"image_url": {}}]}, "no image"),
        ({"images": 5}, "image is not text but int"),
        ({"images": [["a.png"]]}, "image is not text but list"),
        ({"images": [{"image_url": "https://h/a.png"}]}, "image: nothing is fetched from https:"),
        ({"images": "left out"}, "no image"),
        ({"prompt": "left out"}, "no instruction"),
        ({"n": 2}, "n must be 1, got '2'"),
        ({"n": "1"}, "n must be 1, got '1'"),
        ({"response_format": "url"}, "response_format must be b64_json, got 'url'"),
        ({"background": "transparent"}, "background must be auto or opaque, got 'transparent'"),
        ({"quality": "high"}, "quality must be auto, got 'high'"),
        ({"input_fidelity": "high"}, "unknown field 'input_fidelity'"),
        ({"stream": True}, "unknown field 'stream'"),
        ({"output_compression": 50}, "unknown field 'output_compression'"),
        ({"size": "1024"}, "size must be auto or WIDTHxHEIGHT"),
    ],
)
def test_a_body_that_is_not_understood_is_rejected_under_its_custom_id(tmp_path, body, said):
    (entry,) = rejected_in(written(tmp_path / "m.jsonl", [openai_line(**body)]))
    assert said in entry.message
    assert entry.id == "one"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "GET"}, "found GET /v1/images/edits, expected POST /v1/images/edits"),
        ({"url": "/v1/chat/completions"}, "found POST /v1/chat/completions, expected POST"),
        ({"body": "text"}, "body is not an object but str"),
        ({"body": None}, "body is not an object but NoneType"),
        ({"custom_id": True}, "id is not text but bool"),
    ],
)
def test_a_line_of_another_request_is_rejected(tmp_path, change, said):
    (entry,) = rejected_in(written(tmp_path / "m.jsonl", [{**openai_line(), **change}]))
    assert said in entry.message


@pytest.mark.parametrize("name", ["method", "url"])
def test_method_and_url_may_be_left_out(tmp_path, name):
    line = openai_line()
    del line[name]
    assert len(items_of(written(tmp_path / "m.jsonl", [line]))) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"image": "s3://b/other.png"},
        {"instruction": "make it day"},
        {"num_inference_steps": 7, "steps": 8},
        {"id": "two"},
    ],
)
def test_one_field_under_two_names_of_a_body_is_rejected(tmp_path, body):
    (entry,) = entries(written(tmp_path / "m.jsonl", [openai_line(**body)]))
    assert isinstance(entry, Rejected)
    assert "twice" in entry.message


def test_fields_of_a_body_can_be_ignored(tmp_path):
    source = written(tmp_path / "m.jsonl", [openai_line(input_fidelity="high")])
    assert len(items_of(dataclasses.replace(source, ignore=("input_fidelity",)))) == 1


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.JSONL"])
def test_a_manifest_of_openai_is_known_by_its_first_line(tmp_path, name):
    assert answers_openai(written(tmp_path / name, [openai_line(), {"image": "a.png"}]))
    assert not answers_openai(written(tmp_path / name, [{"image": "a.png"}, openai_line()]))
    assert not answers_openai(written(tmp_path / name, [{"custom_id": "one"}]))
    assert not answers_openai(written(tmp_path / name, []))


def test_only_lines_of_json_can_be_openais(tmp_path):
    assert not answers_openai(write_as("csv", tmp_path / "m.csv", [{"custom_id": "a", "body": "{}", "image": "a"}]))
    assert not answers_openai(prefix(str(tmp_path)))
