"""Files of rows: .jsonl and .json (one object a line), .csv, .parquet and .txt (one text a line), local or on S3.

Every row comes with its place, and one that cannot be read with what is wrong with it: one bad row never costs the
others. What the columns mean is the caller's business. A file is read as it is needed and never held whole.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ip2p.errors import InputError, StorageError
from ip2p.storage import open_file


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file.

    ``index`` is its 0-based place, ``line`` the 1-based line (Parquet: row) to name in messages. Where it cannot be
    read, ``problem`` says why. ``last_line`` is above ``line`` where a quoted CSV field runs over several.
    """

    index: int
    line: int
    values: Mapping[str, object]
    problem: str = ""
    last_line: int = 0


Check = Callable[[Sequence[str]], None]
"""Called with a table's column names before any row; raises InputError where needed ones are missing."""


@dataclass(frozen=True)
class Wanted:
    """What a caller wants of a file: names of the columns to read (None: all), their check, the one of a .txt."""

    columns: Collection[str] | None = None
    check: Check = lambda names: None
    text_column: str = "text"


def read_rows(uri: str, wanted: Wanted) -> Iterator[Row]:
    """The rows of ``uri`` in order.

    Raises InputError for a file of another kind or one that is damaged as a whole, StorageError where it cannot be
    read.
    """
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix not in _READERS:
        known = ", ".join(_READERS)
        raise InputError(f"{uri}: cannot read rows from {suffix or 'a name without suffix'}; use one of {known}")
    with open_file(uri) as stream:
        try:
            yield from _READERS[suffix](stream, uri, wanted)
        except OSError as error:
            raise StorageError(f"{uri}: reading stopped: {error.strerror or error}; run the command again") from error


def _as_text(stream: typing.BinaryIO, uri: str, newline: str) -> typing.TextIO:
    head = stream.read(2)
    stream.seek(0)
    if head in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{uri}: is UTF-16 text; save it as UTF-8 and try again")
    # Bytes that are not UTF-8 become lone surrogates, which the check of each row finds.
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)


def _json_rows(stream: typing.BinaryIO, uri: str, wanted: Wanted) -> Iterator[Row]:
    for index, line in enumerate(_as_text(stream, uri, "\n")):
        if index == 0 and line.lstrip().startswith("["):
            raise InputError(f"{uri}: holds one JSON array; write one object a line (jq -c '.[]' does it)")
        values, problem = _json_object(line)
        yield Row(index, index + 1, values, problem)


def _json_object(line: str) -> tuple[Mapping[str, object], str]:
    if not line.strip():
        return {}, "blank line"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"broken JSON: {error}"
    return (values, "") if isinstance(values, dict) else ({}, f"not a JSON object but {type(values).__name__}")


def _text_rows(stream: typing.BinaryIO, uri: str, wanted: Wanted) -> Iterator[Row]:
    for index, line in enumerate(_as_text(stream, uri, "\n")):
        yield Row(index, index + 1, {wanted.text_column: line})


def _csv_rows(stream: typing.BinaryIO, uri: str, wanted: Wanted) -> Iterator[Row]:
    reader = csv.reader(_as_text(stream, uri, ""))
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise InputError(f"{uri}: broken CSV in its header: {error}") from error
    if not header:
        return
    _check_names(header, uri, wanted)
    for index in itertools.count():
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(index, line, {}, f"broken CSV: {error}", reader.line_num)
        else:
            problem = "" if len(fields) == len(header) else _wrong_width(len(fields), len(header))
            yield Row(index, line, dict(zip(header, fields, strict=False)), problem, reader.line_num)


def _check_names(names: Sequence[str], uri: str, wanted: Wanted) -> None:
    wanted.check(names)
    for name in names if wanted.columns is None else wanted.columns:
        if name and names.count(name) > 1:  # nameless columns are what a spreadsheet leaves behind
            raise InputError(f"{uri}: two columns are called {name!r}; rename one")


def _wrong_width(found: int, expected: int) -> str:
    if not found:
        return "blank line"
    return f"{found} fields where the header has {expected}; put texts that hold commas in double quotes"


def _parquet_rows(stream: typing.BinaryIO, uri: str, wanted: Wanted) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        _check_names(file.schema_arrow.names, uri, wanted)
        names = [name for name in file.schema_arrow.names if wanted.columns is None or name in wanted.columns]
        index = itertools.count()
        for batch in file.iter_batches(batch_size=4096, columns=names):
            columns = [_texts_or_values(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                at = next(index)
                yield Row(at, at + 1, dict(zip(names, values, strict=True)))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{uri}: not a whole Parquet file ({error}); fetch or write it again") from error


def _texts_or_values(column: typing.Any) -> list[object]:
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Decoded here, because one bad byte would make pyarrow refuse the whole column.
        texts = column.cast(pa.large_binary()).to_pylist()
        return [text if text is None else text.decode(errors="surrogateescape") for text in texts]
    return typing.cast("list[object]", column.to_pylist())


_READERS: dict[str, Callable[[typing.BinaryIO, str, Wanted], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
