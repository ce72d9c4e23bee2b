import csv
import json

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto import mock_aws

from ip2p.errors import InputError, StorageError
from ip2p.seeds import stable_id
from ip2p.triplets.captions import BadRow, as_batch, beside, read_captions

THREE = ["a cat", "a dog, sitting", 'a "red" boat']


def written(path, lines) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def captions_of(found) -> list[str]:
    return [row.caption for row in found.rows]


def write_as(kind, path, captions) -> str:
    if kind == "txt":
        path.write_text("\n".join(captions))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "caption"], *([str(i), c] for i, c in enumerate(captions))])
    elif kind == "parquet":
        pq.write_table(pa.table({"id": range(len(captions)), "TEXT": captions}), path)
    else:
        written(path, [{"caption": caption} for caption in captions])
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_each_format_gives_the_same_rows(tmp_path, kind):
    found = read_captions(write_as(kind, tmp_path / f"captions.{kind}", THREE))
    assert captions_of(found) == THREE
    assert [row.index for row in found.rows] == [0, 1, 2]
    assert [row.line for row in found.rows] == ([2, 3, 4] if kind == "csv" else [1, 2, 3])
    assert found.rows[0].prompt_id == stable_id("a cat")
    assert found.bad == []


def test_suffixes_in_capitals_are_known(tmp_path):
    assert captions_of(read_captions(write_as("txt", tmp_path / "C.TXT", THREE))) == THREE


@pytest.mark.parametrize("key", ["caption", "input", "text", "TEXT"])
def test_each_known_key_names_the_caption(tmp_path, key):
    assert captions_of(read_captions(written(tmp_path / "c.jsonl", [{"x": "no", key: "a cat"}]))) == ["a cat"]


def test_the_better_known_key_wins_and_an_empty_one_does_not(tmp_path):
    lines = [{"text": "b", "caption": "a"}, {"caption": None, "input": "c"}, {"caption": " ", "text": "d"}]
    assert captions_of(read_captions(written(tmp_path / "c.jsonl", lines))) == ["a", "c", "d"]


def test_the_released_prompts_file_gives_triplets(tmp_path):
    lines = [
        {"input": "a cat", "edit": "make it night", "output": "a cat at night", "url": "http://x/1.jpg"},
        {"input": "A cat.", "edit": "make it day", "output": "a cat by day"},
    ]
    path = written(tmp_path / "prompts.jsonl", lines)
    first, second = read_captions(path).rows
    assert (first.instruction, first.edited_caption, first.url) == ("make it night", "a cat at night", "http://x/1.jpg")
    assert first.prompt_id == stable_id("a cat", "make it night", "a cat at night")
    assert (second.caption, second.instruction, second.url) == ("A cat.", "make it day", "")


def test_only_captions_are_read_for_a_writer_that_invents_the_edit(tmp_path):
    lines = [{"input": "a cat", "edit": "x", "output": "y"}, {"input": "A cat.", "edit": "z"}, {"input": "a dog"}]
    found = read_captions(written(tmp_path / "prompts.jsonl", lines), given=False)
    assert [(row.caption, row.instruction) for row in found.rows] == [("a cat", ""), ("a dog", "")]
    assert found.rows[0].prompt_id == stable_id("a cat")
    assert found.bad == [BadRow(2, "duplicate of line 1")]


def test_our_own_keys_give_triplets_with_their_task(tmp_path):
    line = {"caption": "a cat", "instruction": "x", "edited_caption": "y", "task": "style"}
    (row,) = read_captions(written(tmp_path / "t.jsonl", [line])).rows
    assert (row.instruction, row.edited_caption, row.task) == ("x", "y", "style")


@pytest.mark.parametrize(("line", "message"), [
    ({"input": "a", "edit": "x"}, "half a triplet: no edited caption"),
    ({"input": "a", "edit": " ", "output": "y"}, "half a triplet: no instruction"),
    ({"input": "a", "edit": "x", "output": 5}, "edited_caption is not text but int"),
])  # fmt: skip
def test_half_a_triplet_is_a_bad_row(tmp_path, line, message):
    found = read_captions(written(tmp_path / "t.jsonl", [{"input": "good"}, line]))
    assert found.bad == [BadRow(2, message)]


def test_bad_line_17_among_30_costs_only_itself_and_mending_it_moves_no_id(tmp_path):
    lines = [{"caption": f"caption {n}"} for n in range(1, 31)]
    broken = [*lines[:16], '{"caption": "caption 17"\n', *lines[17:]]
    found = read_captions(written(tmp_path / "b.jsonl", broken))
    assert captions_of(found) == [f"caption {n}" for n in range(1, 31) if n != 17]
    assert [bad.line for bad in found.bad] == [17]
    assert found.bad[0].message.startswith("broken JSON: ")
    mended = read_captions(written(tmp_path / "m.jsonl", lines))
    assert [row for row in mended.rows if row.line != 17] == found.rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\n", "blank line"),
        ('"a cat"\n', "not a JSON object but str"),
        ({"label": "x"}, "no caption (found: 'label')"),
        ({}, "no caption (found: nothing)"),
        ({"caption": ""}, "the caption is blank"),
        ({"caption": "\u200b"}, "the caption is blank"),
        ({"caption": 17}, "caption is not text but int"),
        ({"caption": ["a"]}, "caption is not text but list"),
        ({"caption": "x" * 5000}, "caption has 5000 characters, the limit is 1000"),
        ('{"caption": "a \\ud83c"}\n', "caption is not valid UTF-8 (after 'a ')"),
        ({"caption": "First  CAT!"}, "duplicate of line 1"),
    ],
)
def test_a_bad_row_is_named_and_the_others_stay(tmp_path, line, message):
    path = written(tmp_path / "c.jsonl", [{"caption": "first cat"}, line, {"caption": "last cat"}])
    found = read_captions(path)
    assert captions_of(found) == ["first cat", "last cat"]
    assert [row.index for row in found.rows] == [0, 2]
    assert found.bad == [BadRow(2, message)]


def test_deeply_nested_json_is_a_bad_row(tmp_path):
    found = read_captions(written(tmp_path / "c.jsonl", [{"caption": "a"}, '{"caption":' + "[" * 200_000 + "\n"]))
    assert captions_of(found) == ["a"]
    assert found.bad[0].message.startswith("broken JSON")


def test_a_thousand_characters_still_fit(tmp_path):
    assert len(read_captions(written(tmp_path / "c.jsonl", [{"caption": "x" * 1000}])).rows[0].caption) == 1000


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "parquet"])
def test_bytes_that_are_not_utf8_cost_only_their_row(tmp_path, kind):
    path, latin = tmp_path / f"c.{kind}", b"caf\xe9"
    if kind == "parquet":
        column = pa.array([b"a cat", latin, b"a dog"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"caption": column}), path)
    else:
        head, row = {"jsonl": (b"", b'{"caption": "%s"}\n'), "csv": (b"caption\n", b"%s\n"), "txt": (b"", b"%s\n")}[
            kind
        ]
        path.write_bytes(head + b"".join(row % text for text in (b"a cat", latin, b"a dog")))
    found = read_captions(str(path))
    assert captions_of(found) == ["a cat", "a dog"]
    assert found.bad == [BadRow(3 if kind == "csv" else 2, "caption is not valid UTF-8 (after 'caf')")]


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path):
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbfcaption,url\r\na cat,http://x\r\na dog,\r\n")
    found = read_captions(str(tmp_path / "c.csv"))
    assert [(row.caption, row.url) for row in found.rows] == [("a cat", "http://x"), ("a dog", "")]


def test_a_comma_outside_quotes_is_a_bad_row_and_never_a_cut_caption(tmp_path):
    (tmp_path / "c.csv").write_text("caption\na cat\na dog, sitting\n\na boat\n")
    found = read_captions(str(tmp_path / "c.csv"))
    assert captions_of(found) == ["a cat", "a boat"]
    assert [bad.line for bad in found.bad] == [3, 4]
    assert found.bad[0].message.startswith("2 fields where the header has 1")
    assert found.bad[1].message == "blank line"


def test_lines_are_the_files_own_where_a_csv_text_spans_several(tmp_path):
    (tmp_path / "c.csv").write_text('caption\n"a cat\non a mat"\n\na dog\n')
    found = read_captions(str(tmp_path / "c.csv"))
    assert [(row.index, row.line, row.caption) for row in found.rows] == [(0, 2, "a cat on a mat"), (2, 5, "a dog")]
    assert found.bad == [BadRow(4, "blank line")]


def test_an_open_quote_says_how_far_it_runs(tmp_path):
    rows = "\n".join(f"caption number {n}" for n in range(100))
    (tmp_path / "c.csv").write_text(f'caption\na cat\n"a dog\n{rows}\n')
    (bad,) = read_captions(str(tmp_path / "c.csv")).bad
    assert bad.line == 3
    assert bad.message.endswith("(the row runs to line 103; is a quote left open?)")


def test_reading_goes_on_after_a_field_that_the_csv_module_refuses(tmp_path):
    (tmp_path / "c.csv").write_text(f"caption\na cat\n{'x' * 200_000}\na dog\n")
    found = read_captions(str(tmp_path / "c.csv"))
    assert captions_of(found) == ["a cat", "a dog"]
    assert [(bad.line, bad.message[:10]) for bad in found.bad] == [(3, "broken CSV")]


def test_parquet_nulls_and_other_types_are_bad_rows(tmp_path):
    pq.write_table(pa.table({"caption": ["a cat", None, "a dog"], "extra": [1, 2, 3]}), tmp_path / "c.parquet")
    assert read_captions(str(tmp_path / "c.parquet")).bad == [BadRow(2, "the caption is blank")]
    pq.write_table(pa.table({"caption": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="none of its 2 rows can be used; line 1: caption is not text but int"):
        read_captions(str(tmp_path / "n.parquet"))


def test_line_breaks_inside_a_caption_become_spaces(tmp_path):
    found = read_captions(written(tmp_path / "c.jsonl", [{"caption": " a cat\n##\non  a mat "}]))
    assert captions_of(found) == ["a cat ## on a mat"]


def test_a_url_or_task_that_is_not_text_does_not_cost_the_caption(tmp_path):
    (row,) = read_captions(written(tmp_path / "c.jsonl", ['{"caption": "a", "url": NaN, "task": 3}\n'])).rows
    assert (row.url, row.task) == ("", "")


def test_limit_counts_usable_rows_and_stops_reading(tmp_path):
    path = written(tmp_path / "c.jsonl", [{"caption": "a"}, "broken\n", {"caption": "b"}, "broken too\n"])
    found = read_captions(path, limit=2)
    assert captions_of(found) == ["a", "b"]
    assert [bad.line for bad in found.bad] == [2]
    with pytest.raises(InputError, match="at least 1"):
        read_captions(path, limit=0)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("e.jsonl", b"", "the file is empty"),
        ("e.csv", b"", "the file is empty"),
        ("h.csv", b"caption\n", "the file is empty"),
        ("e.txt", b"", "the file is empty"),
        ("w.csv", b"label,id\nx,1\n", "no caption column; it has: 'label', 'id'; name the caption's column"),
        ("w.jsonl", b'{"label": "x"}\n{"label": "y"}\n', "none of its 2 rows can be used; line 1: no caption"),
        ("a.json", b'[{"caption": "a cat"}]', "one JSON array; write one object a line"),
        ("u.txt", "a cat".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("t.parquet", b"PAR1 not really", "not a whole Parquet file"),
        ("c.xml", b"<a/>", "cannot read rows from .xml; use one of .jsonl"),
        ("noname", b"a", "cannot read rows from a name without suffix"),
    ],
)
def test_a_file_in_which_nothing_can_be_used_is_one_error_that_names_it(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_captions(str(tmp_path / name))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_a_parquet_file_without_a_caption_column_lists_what_it_has(tmp_path):
    pq.write_table(pa.table({"label": ["x"]}), tmp_path / "w.parquet")
    with pytest.raises(InputError, match="no caption column; it has: 'label'"):
        read_captions(str(tmp_path / "w.parquet"))


def test_a_parquet_file_cut_short_is_refused(tmp_path):
    path = write_as("parquet", tmp_path / "c.parquet", THREE)
    data = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a whole Parquet file"):
        read_captions(path)


def test_a_missing_file_or_a_folder_is_a_storage_error(tmp_path):
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(StorageError, match=r"x\.txt: no such file"):
        read_captions(str(tmp_path / "x.txt"))
    with pytest.raises(StorageError, match=r"d\.txt: cannot read it"):
        read_captions(str(tmp_path / "d.txt"))


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as environment, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.delenv("AWS_ENDPOINT_URL", raising=False)
        environment.delenv("AWS_PROFILE", raising=False)
        client = boto3.client("s3")
        client.create_bucket(Bucket="captions")
        yield client


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_captions_are_read_from_s3(bucket, tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    write_as(kind, path, THREE)
    bucket.put_object(Bucket="captions", Key=f"in/c.{kind}", Body=path.read_bytes())
    assert captions_of(read_captions(f"s3://captions/in/c.{kind}")) == THREE


def test_a_bucket_or_object_that_is_not_there_is_a_storage_error(bucket):
    with pytest.raises(StorageError, match=r"s3://captions/none\.txt: no such object"):
        read_captions("s3://captions/none.txt")
    with pytest.raises(StorageError, match="no such bucket; create it or correct the name"):
        read_captions("s3://elsewhere/c.txt")
    with pytest.raises(StorageError, match="names no file"):
        read_captions("s3://c.txt")


def test_rows_become_the_columns_of_a_batch(tmp_path):
    batch = as_batch(read_captions(write_as("txt", tmp_path / "c.txt", THREE)).rows)
    assert list(batch["index"]) == [0, 1, 2]
    assert list(batch["caption"]) == THREE
    assert set(batch) == {"index", "prompt_id", "caption", "url", "instruction", "edited_caption", "task", "picture"}


def test_pictures_are_found_beside_the_file_and_rows_without_one_are_named(tmp_path):
    urls = ["a.png", "sub/b.png", "/abs/c.png", "s3://bucket/d.png", "", "https://host/e.png"]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"caption": f"boat {n}", "url": url}) + "\n" for n, url in enumerate(urls)))
    found = read_captions(str(path), pictures=True)
    assert [row.picture for row in found.rows] == [
        f"{tmp_path}/a.png", f"{tmp_path}/sub/b.png", "/abs/c.png", "s3://bucket/d.png"
    ]  # fmt: skip
    assert [row.url for row in found.rows] == urls[:4]
    assert [row.index for row in found.rows] == [0, 1, 2, 3]
    assert [(bad.line, bad.message.partition(":")[0]) for bad in found.bad] == [
        (5, "pairs.original=given needs a picture"), (6, "https")
    ]  # fmt: skip
    assert "img2dataset" in found.bad[1].message
    assert as_batch(found.rows)["picture"].tolist()[0] == f"{tmp_path}/a.png"
    assert {row.picture for row in read_captions(str(path)).rows} == {""}


def test_rows_without_a_picture_do_not_count_towards_the_limit(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"caption": "a boat"}\n{"caption": "a house", "url": "h.png"}\n')
    assert [row.caption for row in read_captions(str(path), 1, pictures=True).rows] == ["a house"]


def test_the_picture_is_part_of_what_a_prompt_is_and_the_folder_is_not(tmp_path):
    rows = [{"caption": "a boat", "url": url} for url in ("a.png", "b.png", "a.png")]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = (read_captions(str(tmp_path / folder / "c.jsonl"), pictures=True) for folder in ("one", "two"))
    assert len(one.rows) == 2
    assert one.bad == [BadRow(3, "duplicate of line 1")]
    assert [row.prompt_id for row in one.rows] == [row.prompt_id for row in two.rows]
    assert len(read_captions(str(tmp_path / "one" / "c.jsonl")).rows) == 1


def test_a_file_without_any_picture_is_one_error(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"caption": "a boat"}\n')
    with pytest.raises(InputError, match=r"c\.jsonl: none of its 1 rows .* line 1: .* column or key url"):
        read_captions(str(path), pictures=True)


@pytest.mark.parametrize(
    ("file", "place"),
    [("/c.jsonl", "/a.png"), ("c.jsonl", "a.png"), ("s3://b/in/c.jsonl", "s3://b/in/a.png"), ("x/c.csv", "x/a.png")],
)
def test_a_picture_lies_beside_its_file(file, place):
    assert beside(file, "a.png") == place
