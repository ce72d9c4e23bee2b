"""Where the items of a batch come from: a manifest of rows, OpenAI's batch lines, or all pictures below a prefix.

Read line by line and as often as needed, never held whole. A line that cannot be used comes out as Rejected with its
number and does not cost the others; of two lines with one output the second is rejected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ip2p.batch.item import SUFFIXES, EditSettings, Item, item_of
from ip2p.batch.openai_lines import is_openai_line, values_of
from ip2p.errors import InputError
from ip2p.row_files import Row, Wanted, read_rows
from ip2p.storage import open_file, open_folder

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TOLD = ("error", "attempts")
"""What failed.jsonl says beside the row, so that it is a manifest too."""


@dataclass(frozen=True)
class Rejected:
    """A line that cannot be used, and why."""

    line: int
    message: str
    id: str = ""  # where the line had one


@dataclass(frozen=True)
class Source:
    """What is to be edited: ``uri`` is a manifest, or with ``is_prefix`` a folder whose pictures are all meant."""

    uri: str
    is_prefix: bool = False
    settings: EditSettings = field(default_factory=EditSettings)  # where a line names none
    instruction: str = ""  # likewise
    ignore: tuple[str, ...] = ()  # fields of a manifest that are not looked at
    copy: str = ""  # local file to read in place of ``uri``


def kept(source: Source, place: Path) -> Source:
    """``source`` as it is now, copied into the local folder ``place``: later readings need no store and find no other.

    Raises StorageError where it cannot be read.
    """
    copy = place / f"manifest{PurePosixPath(source.uri).suffix.lower() if not source.is_prefix else '.jsonl'}"
    if source.is_prefix:
        listed = open_folder(source.uri.rstrip("/")).versions()
        with copy.open("w") as file:
            for name, version in listed:
                file.write(json.dumps([name, version]) + "\n")
    else:
        with open_file(source.uri) as whole, copy.open("wb") as file:
            shutil.copyfileobj(whole, file, 2**20)
    return dataclasses.replace(source, copy=str(copy))


def entries(source: Source) -> Iterator[Item | Rejected]:
    """Every line, in order. Raises InputError or StorageError where the whole cannot be read."""
    seen: dict[int, int] = {}
    for entry in _below_prefix(source) if source.is_prefix else _of_manifest(source):
        if isinstance(entry, Item):
            # Not the names themselves: of two million lines these are 150 MB, and names would be several times that.
            name = int.from_bytes(hashlib.blake2b(entry.output.encode(), digest_size=8).digest(), "big")
            first = seen.setdefault(name, entry.line)
            if first != entry.line:
                yield Rejected(entry.line, f"output {entry.output!r} is that of line {first} already", entry.id)
                continue
        yield entry


def answers_openai(source: Source) -> bool:
    """Whether the manifest holds OpenAI's batch lines, by its first one."""
    if source.is_prefix or not source.uri.lower().endswith((".jsonl", ".json")):
        return False
    return any(is_openai_line(row.values) for row in _first(_rows(source, Wanted())))


def _first(rows: Iterator[Row]) -> list[Row]:
    for row in rows:
        return [row]
    return []


def _of_manifest(source: Source) -> Iterator[Item | Rejected]:
    base = source.uri.rpartition("/")[0] if "://" in source.uri else str(Path(source.uri).parent.resolve())
    defaults = Item(0, "", "", source.instruction, "", source.settings)
    for row in _rows(source, Wanted(check=_check_columns(source), text_column="image")):
        try:
            yield _item(row, base, defaults, source.ignore)
        except InputError as error:
            id_ = row.values.get("custom_id", row.values.get("id", ""))
            yield Rejected(row.line, str(error), id_ if isinstance(id_, str) else "")


def _rows(source: Source, wanted: Wanted) -> Iterator[Row]:
    """Errors name the manifest, not its copy."""
    try:
        yield from read_rows(source.copy or source.uri, wanted)
    except InputError as error:
        raise InputError(str(error).replace(source.copy or source.uri, source.uri)) from error


def _check_columns(source: Source) -> typing.Callable[[typing.Sequence[str]], None]:
    def check(names: typing.Sequence[str]) -> None:
        if "image" not in names:
            raise InputError(f"{source.uri}: no column image; it has: {', '.join(map(repr, names))}")

    return check


def _item(row: Row, base: str, defaults: Item, ignore: tuple[str, ...]) -> Item:
    if row.problem:
        raise InputError(row.problem)
    values: Mapping[str, object] = values_of(row.values) if is_openai_line(row.values) else row.values
    values = {name: value for name, value in values.items() if name not in (*ignore, *TOLD)}
    for name in ("image", "mask"):
        if isinstance(value := values.get(name), str):
            values[name] = _located(value.strip(), base)
    return item_of(values, row.line, defaults)


def _located(uri: str, base: str) -> str:
    """A relative path is one beside the manifest."""
    if not uri or ":" in uri.split("/")[0] or uri.startswith("/"):
        return uri
    return f"{base}/{uri}"


def _below_prefix(source: Source) -> Iterator[Item | Rejected]:
    uri = source.uri.rstrip("/") if "://" in source.uri else str(Path(source.uri).resolve())
    suffix = SUFFIXES[source.settings.output_format]
    defaults = Item(0, "", "", source.instruction, "", source.settings)
    found = (one for one in _listed(source) if PurePosixPath(one[0]).suffix.lower() in PICTURES)
    for line, (name, version) in enumerate(found, 1):
        output = str(PurePosixPath(name).with_suffix(f".{suffix}"))
        row = {"id": name, "image": f"{uri}/{name}", "output": output, "version": version}
        try:
            yield item_of(row, line, defaults)
        except InputError as error:
            yield Rejected(line, str(error), name)


def _listed(source: Source) -> Iterator[tuple[str, str]]:
    if not source.copy:
        yield from open_folder(source.uri.rstrip("/")).versions()
        return
    with Path(source.copy).open() as file:
        for line in file:
            name, version = json.loads(line)
            yield name, version
