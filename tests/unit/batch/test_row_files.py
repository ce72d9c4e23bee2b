"""Files of rows: places, columns and what is wrong with a row. What a caption or an item is, is tested with those."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.errors import InputError, StorageError
from ip2p.row_files import Row, Wanted, read_rows
from ip2p.storage import open_folder

EVERYTHING = Wanted()


def test_rows_of_json_are_objects_as_they_stand(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1, "b": [2]}\n\n{"a"\n7\n{"a": null}')
    rows = list(read_rows(str(tmp_path / "r.jsonl"), EVERYTHING))
    assert rows[0] == Row(0, 1, {"a": 1, "b": [2]})
    assert rows[1] == Row(1, 2, {}, "blank line")
    assert rows[2].problem.startswith("broken JSON: ")
    assert rows[3] == Row(3, 4, {}, "not a JSON object but int")
    assert rows[4] == Row(4, 5, {"a": None})


def test_rows_of_a_table_are_texts_under_the_names_of_the_header(tmp_path):
    (tmp_path / "r.csv").write_text('a, b\n1,2\n3\n4,5,6\n"7\n8",9\n\n10,11\n')
    rows = list(read_rows(str(tmp_path / "r.csv"), EVERYTHING))
    assert [(row.index, row.line, row.last_line) for row in rows] == [
        (0, 2, 2), (1, 3, 3), (2, 4, 4), (3, 5, 6), (4, 7, 7), (5, 8, 8)
    ]  # fmt: skip
    assert rows[0].values == {"a": "1", "b": "2"}
    assert rows[1].problem.startswith("1 fields where the header has 2; put texts that hold commas in double quotes")
    assert rows[2].problem.startswith("3 fields where the header has 2")
    assert rows[3] == Row(3, 5, {"a": "7\n8", "b": "9"}, "", 6)
    assert rows[4].problem == "blank line"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_header_with_a_name_twice_is_refused_where_that_column_is_read(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    if kind == "csv":
        path.write_text("a,b,a\n1,2,3\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array([number]) for number in (1, 2, 3)], names=["a", "b", "a"]), path)
    with pytest.raises(InputError, match=f"r.{kind}: two columns are called 'a'; rename one"):
        list(read_rows(str(path), EVERYTHING))
    assert [str(row.values["b"]) for row in read_rows(str(path), Wanted(columns=("b",)))] == ["2"]


def test_columns_without_a_name_are_what_a_spreadsheet_leaves_behind(tmp_path):
    (tmp_path / "r.csv").write_text("a,,\n1,,\n")
    assert [row.values for row in read_rows(str(tmp_path / "r.csv"), EVERYTHING)] == [{"a": "1", "": ""}]


def test_a_header_that_the_csv_module_refuses_is_one_error(tmp_path):
    (tmp_path / "r.csv").write_text(f"{'x' * 200_000},b\n1,2\n")
    with pytest.raises(InputError, match=r"r\.csv"):
        list(read_rows(str(tmp_path / "r.csv"), EVERYTHING))


def test_lines_of_a_text_are_rows_of_one_column(tmp_path):
    (tmp_path / "r.txt").write_text("one\ntwo")
    rows = list(read_rows(str(tmp_path / "r.txt"), Wanted(text_column="name")))
    assert rows == [Row(0, 1, {"name": "one\n"}), Row(1, 2, {"name": "two"})]
    assert next(read_rows(str(tmp_path / "r.txt"), EVERYTHING)).values == {"text": "one\n"}


def test_rows_of_parquet_have_the_types_of_their_columns(tmp_path):
    table = pa.table({"a": ["x", None], "b": [1, None], "c": [[1.5], None], "d": [{"e": 1}, None]})
    pq.write_table(table, tmp_path / "r.parquet")
    rows = list(read_rows(str(tmp_path / "r.parquet"), EVERYTHING))
    assert rows == [
        Row(0, 1, {"a": "x", "b": 1, "c": [1.5], "d": {"e": 1}}),
        Row(1, 2, {"a": None, "b": None, "c": None, "d": None}),
    ]


def test_only_the_columns_that_are_wanted_are_read_of_parquet(tmp_path):
    pq.write_table(pa.table({"a": [1, 2], "b": [3, 4], "c": [5, 6]}), tmp_path / "r.parquet")
    rows = list(read_rows(str(tmp_path / "r.parquet"), Wanted(columns=("c", "a", "not there"))))
    assert [row.values for row in rows] == [{"a": 1, "c": 5}, {"a": 2, "c": 6}]


def test_places_go_on_through_all_groups_of_a_parquet_file(tmp_path):
    pq.write_table(pa.table({"a": range(10_000)}), tmp_path / "r.parquet", row_group_size=3000)
    rows = list(read_rows(str(tmp_path / "r.parquet"), EVERYTHING))
    assert [row.index for row in rows] == [row.values["a"] for row in rows] == list(range(10_000))
    assert rows[-1].line == 10_000


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_names_of_a_table_are_checked_before_any_row(tmp_path, kind):
    def check(names):
        raise InputError(f"not these: {sorted(names)}")

    if kind == "csv":
        (tmp_path / "r.csv").write_text("b,a\n1,2\n")
    else:
        pq.write_table(pa.table({"b": [1], "a": [2]}), tmp_path / "r.parquet")
    with pytest.raises(InputError, match=r"not these: \['a', 'b'\]"):
        next(read_rows(str(tmp_path / f"r.{kind}"), Wanted(check=check)))


def test_a_file_is_read_no_further_than_it_is_asked_for(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"a": 1}) + "\n" + "x" * 10_000_000)
    rows = read_rows(str(tmp_path / "r.jsonl"), EVERYTHING)
    assert next(rows).values == {"a": 1}
    rows.close()


def test_a_name_of_another_kind_is_refused_with_those_that_are_known():
    with pytest.raises(InputError, match=r"m\.tsv: cannot read rows from \.tsv; use one of \.jsonl, \.json, \.csv"):
        list(read_rows("m.tsv", EVERYTHING))


@pytest.mark.service
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_rows_are_read_from_s3(s3_uri, tmp_path, kind):
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "r")
    else:
        lines = {"jsonl": '{"text": "one"}\n{"text": "two"}\n', "csv": "text\none\ntwo\n", "txt": "one\ntwo\n"}[kind]
        (tmp_path / "r").write_text(lines)
    open_folder(s3_uri).write(f"r.{kind}", (tmp_path / "r").read_bytes())
    rows = list(read_rows(f"{s3_uri}/r.{kind}", EVERYTHING))
    assert [str(row.values["text"]).strip() for row in rows] == ["one", "two"]
    with pytest.raises(StorageError, match="no such object"):
        list(read_rows(f"{s3_uri}/gone.{kind}", EVERYTHING))
