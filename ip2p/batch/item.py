"""An item of a batch: one picture, one instruction, one output. Its numbers decide the result and nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from ip2p.batch.places import is_taken
from ip2p.errors import InputError
from ip2p.images import FORMATS
from ip2p.seeds import derive_seed, stable_id

MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_SCALE = 1000.0
MAX_CHARACTERS = 1000
MAX_NAME = 900
"""Of an id, which may be a picture's name, and in bytes of an output: S3 takes 1024 with the folder's own."""
SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
NUMERICS = 1
"""To be raised when the same request would give other bytes than before."""


@dataclass(frozen=True)
class EditSettings:
    """How to edit. None: the model's own, or for the seed one that belongs to the item."""

    steps: int = 20
    guidance_scale: float | None = None  # s_T
    image_guidance_scale: float | None = None  # s_I
    seed: int | None = None
    negative_prompt: str = ""
    sampler: str = "euler_ancestral"
    resolution: int | None = None  # pixels
    size: str = ""  # WIDTHxHEIGHT of the result, cut to
    restore_size: bool = False
    output_format: str = "png"


@dataclass(frozen=True)
class Item:
    """One line of a manifest, checked."""

    line: int  # 1-based, of the manifest
    id: str
    image: str  # local path or s3:// of the picture, or data:…;base64,…
    instruction: str
    output: str  # name in the output folder
    settings: EditSettings
    mask: str = ""  # as ``image``; white, or transparent, is edited
    version: str = ""  # of the picture, where the manifest knows it

    @property
    def seed(self) -> int:
        """The item's own seed where none was asked for: 0 to MAX_SEED."""
        given = self.settings.seed
        return derive_seed("batch", self.id) % (MAX_SEED + 1) if given is None else given

    def key(self, model: str) -> str:
        """32 hex digits that say what is asked: the same for two lines only if their results are the same.

        ``model`` says all about the editor that decides results. The picture's version takes part where it is known
        without a look at the picture.
        """
        what = [NUMERICS, model, self.image, self.version, self.mask, self.instruction, self.output, self.seed]
        asked = json.dumps([*what, dataclasses.asdict(self.settings)], sort_keys=True)
        return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()

    def fingerprint(self, model: str, version: str, mask_version: str = "") -> str:
        """The same, of the very pictures that were read."""
        return hashlib.blake2b(f"{self.key(model)} {version} {mask_version}".encode(), digest_size=16).hexdigest()


def item_of(values: Mapping[str, object], line: int, defaults: Item) -> Item:
    """The item that a row's ``values`` ask for; what they leave out is that of ``defaults``.

    Raises InputError that names the field and says what is wanted.
    """
    known = {name: value for name, value in values.items() if value is not None and value != ""}
    unknown = [name for name in known if name not in READERS]
    if unknown:
        raise InputError(f"unknown field {unknown[0]!r}; known: {', '.join(READERS)} (or name it with --ignore)")
    read: dict[str, typing.Any] = {}
    for name, value in known.items():
        field, reader = READERS[name]
        if field in read:
            raise InputError(f"{field} is given twice")
        read[field] = reader(name, value)
    own = {name: read.pop(name) for name in list(read) if name in SETTINGS}
    item = dataclasses.replace(defaults, line=line, settings=dataclasses.replace(defaults.settings, **own), **read)
    if not item.image:
        raise InputError("no image; name it in the field image")
    if not item.instruction:
        raise InputError("no instruction; say what to change in the field instruction, or to all with --instruction")
    _check_together(item.settings)
    return _named(item)


def _named(item: Item) -> Item:
    """With an id and an output, where the row gave none."""
    if not item.id:
        asked = json.dumps(dataclasses.asdict(item.settings), sort_keys=True)
        item = dataclasses.replace(item, id=stable_id(item.image, item.mask, item.instruction, asked))
    if not item.output:
        output = f"{re.sub('[^A-Za-z0-9._-]', '_', item.id)}.{SUFFIXES[item.settings.output_format]}"
        item = dataclasses.replace(item, output=output)
    return item


def _check_together(settings: EditSettings) -> None:
    if settings.size and (settings.restore_size or settings.resolution is not None):
        raise InputError("size says all of the result's size; leave out resolution and restore_size")


# ---- readers of one field: (name, value) to what an Item holds, or InputError. CSV knows only texts.


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid UTF-8") from error
    return value


def _words(name: str, value: object) -> str:
    words = " ".join(_text(name, value).split())
    if len(words) > MAX_CHARACTERS:
        raise InputError(f"{name} has {len(words)} characters, the limit is {MAX_CHARACTERS}")
    return words


def _picture(name: str, value: object) -> str:
    uri = _text(name, value)
    if re.match("(https?|ftp|file):", uri):
        raise InputError(f"{name}: nothing is fetched from {uri.split(':')[0]}:; copy it to s3:// or a local folder")
    if "://" in uri and not uri.startswith("s3://"):
        raise InputError(f"{name}: {uri[:80]} is neither s3://, a local path nor data:")
    if not uri.startswith("data:") and ".." in uri.split("/"):
        raise InputError(f"{name}: {uri[:80]} holds '..'; name the place itself")
    return uri


def _output(name: str, value: object) -> str:
    key = _text(name, value)
    parts = key.split("/")
    if key.startswith("/") or "" in parts or ".." in parts or "." in parts or len(key.encode()) > MAX_NAME:
        raise InputError(f"{name}: {key[:80]!r} is no name inside the output folder")
    if is_taken(key):
        raise InputError(f"{name}: {key[:80]!r} is a name that the job's own files have; choose another")
    return key


def _identity(name: str, value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(name, value)
    if not 1 <= len(text) <= MAX_NAME:
        raise InputError(f"{name} has {len(text)} characters, the limit is {MAX_NAME}")
    return text


def _whole(low: int, high: int) -> typing.Callable[[str, object], int]:
    def read(name: str, value: object) -> int:
        text = str(value).removesuffix(".0")  # what a column of numbers with holes makes of 7
        if isinstance(value, bool) or not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, got {str(value)[:40]!r}")
        return int(text)

    return read


def _scale(name: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(typing.cast(float, value))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MAX_SCALE:
        raise InputError(f"{name} must be a number from 0 to {MAX_SCALE:g}, got {str(value)[:40]!r}")
    return abs(number)  # -0.0 and 0.0 ask for the same


def _flag(name: str, value: object) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise InputError(f"{name} must be true or false, got {str(value)[:40]!r}")
    return known[str(value).lower()]


def _choice(*known: str) -> typing.Callable[[str, object], str]:
    def read(name: str, value: object) -> str:
        if value not in known:
            raise InputError(f"{name} must be {' or '.join(known)}, got {str(value)[:40]!r}")
        return str(value)

    return read


def _size(name: str, value: object) -> str:
    text = _text(name, value)
    if text == "auto":
        return ""
    if not re.fullmatch("[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
        raise InputError(f"{name} must be auto or WIDTHxHEIGHT in pixels, got {text[:40]!r}")
    return text


READERS: dict[str, tuple[str, typing.Callable[[str, object], typing.Any]]] = {
    "id": ("id", _identity),
    "image": ("image", _picture),
    "instruction": ("instruction", _words),
    "edit": ("instruction", _words),
    "prompt": ("instruction", _words),
    "mask": ("mask", _picture),
    "output": ("output", _output),
    "version": ("version", _text),
    "steps": ("steps", _whole(1, MAX_STEPS)),
    "guidance_scale": ("guidance_scale", _scale),
    "image_guidance_scale": ("image_guidance_scale", _scale),
    "seed": ("seed", _whole(0, MAX_SEED)),
    "negative_prompt": ("negative_prompt", _words),
    "sampler": ("sampler", _choice("euler_ancestral", "dpmpp_2m")),
    "resolution": ("resolution", _whole(8, 4096)),
    "size": ("size", _size),
    "restore_size": ("restore_size", _flag),
    "output_format": ("output_format", _choice(*FORMATS)),
}
"""A row's field to the Item's, and what reads it. Some have two names: ours, the original's and OpenAI's."""

SETTINGS = tuple(field.name for field in dataclasses.fields(EditSettings))
