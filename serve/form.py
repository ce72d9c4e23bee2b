"""The form of ``POST /v1/images/edits``: OpenAI's fields and ours. A field is honoured or refused, never ignored.

Names and values are as the official client sends them (text, one part a field; ``image`` or ``image[]``), ours are
flat beside them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ip2p.editing.edit_request import EditRequest
from ip2p.errors import InputError
from ip2p.images import FORMATS
from ip2p.pairs.sampling import SAMPLERS
from ip2p.pictures import decode_mask, decode_picture
from serve.api_errors import ApiError, api_error
from serve.settings import Settings

MAX_SEED = 2**32 - 1
MAX_DEADLINE_MS = 600_000
MAX_PARTIAL_IMAGES = 3
# OpenAI's fields that an instruction edit has no use for, with the values that ask for nothing.
ASKS_NOTHING = {"background": ("auto", "opaque"), "quality": ("auto", "standard"), "response_format": ("b64_json",)}
UNSUPPORTED = ("input_fidelity", "complexity", "markup", "svg", "frame_count", "frame_duration_ms")
FILES = ("image", "image[]", "mask")


@dataclass(frozen=True)
class EditForm:
    """What was asked, every value checked. None: the server's or the model's own."""

    image: bytes
    prompt: str
    mask: bytes | None = None
    model: str | None = None
    n: int = 1
    size: tuple[int, int] | None = None
    output_format: str = "png"
    output_compression: int | None = None
    stream: bool = False
    partial_images: int = 0
    user: str | None = None
    safety_identifier: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    seed: int | None = None
    negative_prompt: str = ""
    sampler: str = "euler_ancestral"
    resolution: int | None = None
    restore_size: bool = False
    priority: str = "interactive"
    deterministic: bool = False
    deadline_ms: int | None = None


def read_form(parts: list[tuple[str, str | bytes]], settings: Settings) -> EditForm:
    """Names and values of a form's parts to an EditForm; files are bytes, all else text. Raises ApiError."""
    values: dict[str, typing.Any] = {}
    for name, value in parts:
        field = "image" if name == "image[]" else name
        if field in values:
            raise _doubled(field)
        values[field] = _read(name, value, settings)
    for field in ("image", "prompt"):
        if field not in values:
            raise ApiError(400, "missing_parameter", f"{field} is missing; send it as a part of the form", field)
    form = EditForm(**{name: value for name, value in values.items() if name not in ASKS_NOTHING})
    _check_together(form)
    return form


def edit_requests(form: EditForm, settings: Settings, seed: int) -> list[EditRequest]:
    """One request a variant, all of the same picture. Decodes pictures: not for an event loop. Raises ApiError."""
    first = _first_request(form, settings, seed)
    return [dataclasses.replace(first, seed=(seed + place) % (MAX_SEED + 1)) for place in range(form.n)]


def _first_request(form: EditForm, settings: Settings, seed: int) -> EditRequest:
    image = _decode(decode_picture, form.image, "image", settings)
    mask = None if form.mask is None else _decode(decode_mask, form.mask, "mask", settings)
    if mask is not None and mask.shape != image.shape[:2]:
        raise ApiError(400, "invalid_value", "the mask must be as large as the picture", "mask")
    return EditRequest(
        image=image,
        mask=mask,
        instruction=form.prompt,
        steps=settings.default_steps if form.num_inference_steps is None else form.num_inference_steps,
        guidance_scale=form.guidance_scale,
        image_guidance_scale=form.image_guidance_scale,
        guidance_interval=(form.guidance_start, form.guidance_end),
        seed=seed,
        negative_prompt=form.negative_prompt,
        sampler=form.sampler,
        resolution=form.resolution,
        size=form.size,
        restore_size=form.restore_size,
        batch=form.priority == "batch",
        alone=form.deterministic,
        previews=form.partial_images if form.stream else 0,
        deadline_s=None if form.deadline_ms is None else form.deadline_ms / 1000,
    )


def _decode(decode: Callable[[bytes, str, int], np.ndarray], data: bytes, name: str, settings: Settings) -> np.ndarray:
    try:
        return decode(data, name, settings.max_pixels)
    except InputError as error:
        raise api_error(error, name) from error


def _doubled(field: str) -> ApiError:
    if field == "image":
        return ApiError(400, "too_many_images", "one picture is edited at a time; send one image", "image")
    return ApiError(400, "duplicate_parameter", f"{field} was sent twice", field)


def _read(name: str, value: str | bytes, settings: Settings) -> typing.Any:
    if name in UNSUPPORTED:
        raise ApiError(400, "unsupported_parameter", f"{name} is not supported; leave it out", name)
    if name in FILES:
        if isinstance(value, str):
            raise ApiError(400, "invalid_value", f"{name} must be a file, not text; pictures are not fetched", name)
        return value
    if isinstance(value, bytes):
        raise ApiError(400, "invalid_value", f"{name} must be text, not a file", name)
    if name in ASKS_NOTHING:
        return _one_of(name, value, ASKS_NOTHING[name])
    if name not in READERS:
        raise ApiError(400, "unknown_parameter", f"{name} is not known; known: {', '.join(known_fields())}", name)
    return READERS[name](name, value, settings)


def known_fields() -> list[str]:
    """Names of all parts that a form may have."""
    return ["image", "mask", *READERS, *ASKS_NOTHING]


def _check_together(form: EditForm) -> None:
    """What two fields say together."""
    if form.stream and form.n > 1:
        raise ApiError(400, "invalid_value", "a stream shows one edit; leave out n or stream", "n")
    if form.partial_images and not form.stream:
        raise ApiError(400, "invalid_value", "partial_images come in a stream; add stream=true", "partial_images")
    if form.output_compression is not None and form.output_format == "png":
        message = "output_compression is for jpeg and webp; png loses nothing"
        raise ApiError(400, "invalid_value", message, "output_compression")
    if form.size is not None and (form.restore_size or form.resolution is not None):
        message = "size says all of the result's size; leave out resolution and restore_size"
        raise ApiError(400, "invalid_value", message, "size")
    if form.guidance_start > form.guidance_end:
        raise ApiError(400, "invalid_value", "guidance_start must not be above guidance_end", "guidance_start")


# ---- readers of one value: (name, text, settings) to a value, or ApiError


def _bad(name: str, wanted: str, value: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{name} must be {wanted}, got {value[:80]!r}", name)


def _one_of(name: str, value: str, known: typing.Sequence[str]) -> str:
    if value not in known:
        raise _bad(name, f"{' or '.join(known)} (nothing else is supported)", value)
    return value


def _whole(low: int, high: int | Callable[[Settings], int]) -> Callable[[str, str, Settings], int]:
    def read(name: str, value: str, settings: Settings) -> int:
        most = high(settings) if callable(high) else high
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", value) or not low <= int(value) <= most:
            raise _bad(name, f"a whole number from {low} to {most}", value)
        return int(value)

    return read


def _number(low: float, high: float) -> Callable[[str, str, Settings], float]:
    def read(name: str, value: str, settings: Settings) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise _bad(name, f"a number from {low:g} to {high:g}", value)
        return number

    return read


def _flag(name: str, value: str, settings: Settings) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if value.lower() not in known:
        raise _bad(name, "true or false", value)
    return known[value.lower()]


def _choice(*known: str) -> Callable[[str, str, Settings], str]:
    return lambda name, value, settings: _one_of(name, value, known)


def _words(name: str, value: str, settings: Settings) -> str:
    """Text for the text encoder: composed characters, no control characters."""
    too_long = _bad(name, f"at most {settings.max_prompt_chars} characters", f"{len(value)} characters")
    if len(value) > 4 * settings.max_prompt_chars:  # before composing, which takes the square of the marks in a text
        raise too_long
    text = unicodedata.normalize("NFC", value.encode("utf-8", "replace").decode("utf-8"))
    text = " ".join("".join(" " if unicodedata.category(one) in ("Cc", "Cs") else one for one in text).split())
    if len(text) > settings.max_prompt_chars:
        raise too_long
    return text


def _prompt(name: str, value: str, settings: Settings) -> str:
    text = _words(name, value, settings)
    if not text:
        raise ApiError(400, "invalid_value", "prompt is empty; say what to change", name)
    return text


def _size(name: str, value: str, settings: Settings) -> tuple[int, int] | None:
    if value == "auto":
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value)
    if not found:
        raise _bad(name, "auto or WIDTHxHEIGHT in pixels", value)
    width, height = int(found[1]), int(found[2])
    if width * height > settings.max_edit_pixels:
        raise _bad(name, f"of at most {settings.max_edit_pixels} pixels", value)
    return width, height


def _model(name: str, value: str, settings: Settings) -> str:
    if value not in settings.models:
        known = ", ".join(settings.models)
        raise ApiError(404, "model_not_found", f"no model {value[:80]!r} here; there are: {known}", name)
    return value


READERS: dict[str, Callable[[str, str, Settings], typing.Any]] = {
    "prompt": _prompt,
    "model": _model,
    "n": _whole(1, lambda settings: settings.max_n),
    "size": _size,
    "output_format": _choice(*FORMATS),
    "output_compression": _whole(0, 100),
    "stream": _flag,
    "partial_images": _whole(0, MAX_PARTIAL_IMAGES),
    "user": _words,
    "safety_identifier": _words,
    "num_inference_steps": _whole(1, lambda settings: settings.max_steps),
    "guidance_scale": _number(0, 100),
    "image_guidance_scale": _number(0, 100),
    "guidance_start": _number(0, 1),
    "guidance_end": _number(0, 1),
    "seed": _whole(0, MAX_SEED),
    "negative_prompt": _words,
    "sampler": _choice(*SAMPLERS),
    "resolution": _whole(8, lambda settings: math.isqrt(settings.max_edit_pixels)),
    "restore_size": _flag,
    "priority": _choice("interactive", "batch"),
    "deterministic": _flag,
    "deadline_ms": _whole(1, MAX_DEADLINE_MS),
}
