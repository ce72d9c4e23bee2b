"""Reads the captions that a run starts from (paper, section 3.1), with every row that cannot be used named by its line.

Takes .jsonl and .json (one object a line), .csv, .parquet and .txt (one caption a line), local or on S3, also the
original's released prompts file, whose rows are triplets already. One bad row never costs the others; a file in which
nothing can be used is one error. This file calls no model and does not look at the length in tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ip2p.errors import InputError
from ip2p.row_files import Row, Wanted, read_rows
from ip2p.seeds import stable_id
from ip2p.triplets.acceptance import is_blank, is_encodable, normalised

MAX_CHARACTERS = 1000
"""Longest text taken from a file; CLIP's 77 tokens hold about 300 characters of English."""

CAPTION_KEYS = ("caption", "input", "text", "TEXT")
INSTRUCTION_KEYS = ("instruction", "edit")
EDITED_CAPTION_KEYS = ("edited_caption", "output")
URL_KEYS = ("url", "URL")

_REMEDY = "name the caption's column or key caption (input, text and TEXT work too)"


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One usable row. ``instruction`` and ``edited_caption`` are both empty unless the row is a triplet already.

    ``index`` is the 0-based place among all rows of the file, usable or not, so that mending a bad row moves no
    other. ``line`` is the 1-based line (Parquet: row) to name in messages. ``url`` is as the file has it, ``picture``
    where the picture that it names is read, "" unless pictures are wanted.
    """

    index: int
    prompt_id: str
    line: int
    caption: str
    url: str = ""
    instruction: str = ""
    edited_caption: str = ""
    task: str = ""
    picture: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: its 1-based line (Parquet: row) and what is wrong with it."""

    line: int
    message: str


@dataclass(frozen=True)
class CaptionFile:
    """What a file holds, in its own order."""

    uri: str
    rows: list[CaptionRow] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def read_captions(uri: str, limit: int | None = None, *, given: bool = True, pictures: bool = False) -> CaptionFile:
    """Read the first ``limit`` usable rows of ``uri`` (all of them if None); reading stops there.

    With ``given``, rows that carry an instruction and an edited caption keep them, and their ``prompt_id`` names
    all three texts. Without it (for writers that invent the edit) only captions are read, and ``prompt_id`` names the
    normalised caption. With ``pictures`` a row needs a url that is a picture's place, in a local file (which may be
    relative to ``uri``) or on S3, and ``prompt_id`` names it too. Of rows with one ``prompt_id`` the first stays and
    the others are bad rows.

    Raises InputError if nothing in the file can be used, StorageError if it cannot be read. Whether pictures are there
    shows when they are used.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the number of captions must be at least 1, got {limit}")
    known = {*CAPTION_KEYS, *INSTRUCTION_KEYS, *EDITED_CAPTION_KEYS, *URL_KEYS, "task"}
    found = CaptionFile(uri)
    lines: dict[str, int] = {}
    for raw in read_rows(uri, Wanted(known, lambda names: _check_columns(names, uri), "caption")):
        row = _checked(raw, given)
        if pictures and isinstance(row, CaptionRow):
            row = _with_picture(row, uri)
        if isinstance(row, CaptionRow) and row.prompt_id in lines:
            row = BadRow(row.line, f"duplicate of line {lines[row.prompt_id]}")
        if isinstance(row, BadRow):
            found.bad.append(row)
            continue
        lines[row.prompt_id] = row.line
        found.rows.append(row)
        if len(found.rows) == limit:
            break
    if not found.rows:
        raise InputError(_nothing_usable(found))
    return found


def read_triplets(uri: str, limit: int | None = None, *, pictures: bool = False) -> CaptionFile:
    """``read_captions`` of a file whose rows must be whole triplets; a row that holds only a caption is a bad row."""
    found = read_captions(uri, limit, pictures=pictures)
    names = [" or ".join(keys) for keys in (INSTRUCTION_KEYS, EDITED_CAPTION_KEYS)]
    lacking = f"a triplet also needs {names[0]}, and {names[1]}"
    bare = [BadRow(row.line, lacking) for row in found.rows if not row.instruction]
    rows = [row for row in found.rows if row.instruction]
    if not rows:
        raise InputError(f"{uri}: holds captions but no triplets: {lacking}; pass it as --captions, or add the columns")
    return CaptionFile(uri, rows, sorted([*found.bad, *bare], key=lambda bad: bad.line))


def is_relative(url: str) -> bool:
    """Whether ``url`` names a file without saying where it starts."""
    return bool(url) and not url.startswith("/") and "://" not in url


def beside(file: str, url: str) -> str:
    """``url`` as it is where it says where it starts, else in the folder of ``file``."""
    folder, slash, _ = file.rpartition("/")
    return f"{folder}{slash}{url}" if is_relative(url) else url


def _with_picture(row: CaptionRow, file: str) -> CaptionRow | BadRow:
    if not row.url:
        return BadRow(row.line, "pairs.original=given needs a picture: name its file in the column or key url")
    place = beside(file, row.url)
    if "://" in place and not place.startswith("s3://"):
        return BadRow(row.line, f"{place}: only local files and s3:// are read; fetch the pictures (img2dataset does)")
    return dataclasses.replace(row, prompt_id=stable_id(row.prompt_id, row.url), picture=place)


def as_batch(rows: Sequence[CaptionRow]) -> dict[str, np.ndarray]:
    """The rows as the columns that ``stage.WriteTriplets`` takes; texts are object arrays of str."""
    names = ("prompt_id", "caption", "url", "instruction", "edited_caption", "task", "picture")
    columns = {name: np.array([getattr(row, name) for row in rows], dtype=object) for name in names}
    return {"index": np.array([row.index for row in rows], dtype=np.int64), **columns}


def _nothing_usable(found: CaptionFile) -> str:
    if not found.bad:
        return f"{found.uri}: the file is empty; it needs at least one caption"
    first = found.bad[0]
    return (f"{found.uri}: none of its {len(found.bad)} rows can be used; "
            f"line {first.line}: {first.message}; {_REMEDY}")  # fmt: skip


def _checked(raw: Row, given: bool) -> CaptionRow | BadRow:
    row = _row_of(raw, given) if not raw.problem else BadRow(raw.line, raw.problem)
    if isinstance(row, BadRow) and raw.last_line > raw.line:
        return BadRow(row.line, f"{row.message} (the row runs to line {raw.last_line}; is a quote left open?)")
    return row


def _row_of(raw: Row, given: bool) -> CaptionRow | BadRow:
    wanted: dict[str, tuple[str, ...]] = {"caption": CAPTION_KEYS}
    if given:
        wanted |= {"instruction": INSTRUCTION_KEYS, "edited_caption": EDITED_CAPTION_KEYS}
    texts = {name: _first(raw.values, keys) for name, keys in wanted.items()}
    problem = _missing(raw.values, texts) or next(filter(None, map(_problem, texts.items())), "")
    if problem:
        return BadRow(raw.line, problem)
    clean = {name: _one_line(text) for name, text in texts.items()}
    notes = {"url": _note(raw.values, URL_KEYS), "task": _note(raw.values, ("task",))}
    return CaptionRow(raw.index, _prompt_id(**clean), raw.line, **clean, **notes)


def _prompt_id(caption: str, instruction: str = "", edited_caption: str = "") -> str:
    if instruction:
        return stable_id(caption, instruction, edited_caption)
    return stable_id(normalised(caption))


def _first(values: Mapping[str, object], keys: Sequence[str]) -> object:
    """The first value that says something, so that an empty cell never hides a full one."""
    present = (values[key] for key in keys if key in values)
    return next((v for v in present if v is not None and not (isinstance(v, str) and is_blank(v))), None)


def _missing(values: Mapping[str, object], texts: Mapping[str, object]) -> str:
    if texts["caption"] is None:
        if any(key in values for key in CAPTION_KEYS):
            return "the caption is blank"
        return f"no caption (found: {', '.join(map(repr, values)) or 'nothing'})"
    instruction, edited_caption = texts.get("instruction"), texts.get("edited_caption")
    if (instruction is None) != (edited_caption is None):
        return "half a triplet: " + ("no instruction" if instruction is None else "no edited caption")
    return ""


def _problem(named: tuple[str, object]) -> str:
    name, value = named
    if value is None:
        return ""
    if not isinstance(value, str):
        return f"{name} is not text but {type(value).__name__}"
    if not is_encodable(value):
        return f"{name} is not valid UTF-8 (after {_one_line(value).encode(errors='ignore').decode()[:20]!r})"
    if len(_one_line(value)) > MAX_CHARACTERS:
        return f"{name} has {len(_one_line(value))} characters, the limit is {MAX_CHARACTERS}"
    return ""


def _one_line(value: object) -> str:
    # A line break inside a text could be taken for a delimiter of the prompt format.
    return " ".join(value.split()) if isinstance(value, str) else ""


def _note(values: Mapping[str, object], keys: Sequence[str]) -> str:
    value = _first(values, keys)
    return value if isinstance(value, str) and is_encodable(value) else ""


def _check_columns(names: Sequence[str], uri: str) -> None:
    if not any(key in names for key in CAPTION_KEYS):
        raise InputError(f"{uri}: no caption column; it has: {', '.join(map(repr, names))}; {_REMEDY}")
