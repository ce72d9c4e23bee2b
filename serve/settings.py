"""What a server offers and where its limits are. Nothing here decides what an edit looks like, but for its defaults."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ip2p.config import EMBEDDED
from ip2p.errors import InputError

PictureCheck = Callable[[np.ndarray, str], str | None]
"""Looks at a picture ``(H, W, 3)`` uint8 and which it is, "input" or "output"; gives a reason to refuse it, or None."""

KEYS_VARIABLE = "IP2P_API_KEYS"


@dataclass(frozen=True)
class Settings:
    """Limits are per request unless they say otherwise."""

    models: Mapping[str, str] = field(default_factory=lambda: {"postcard": EMBEDDED})  # name to folder; the first is
    # taken where a request names none
    dtype: str = "float32"  # of the UNets
    device: str = "auto"
    models_held: int = 2  # in memory at a time
    key_digests: frozenset[bytes] = frozenset()  # of the keys that open the server; empty: it is open
    default_steps: int = 20
    max_steps: int = 100
    max_n: int = 8
    max_prompt_chars: int = 1000
    max_body_bytes: int = 20 * 2**20
    body_timeout_s: float = 60.0  # in which nothing of a body comes
    max_pixels: int = 16_000_000  # of a picture that comes in
    max_edit_pixels: int = 1024 * 1024  # at which it is edited
    queue_limit_s: float = 60.0  # of work that may wait before edits are refused, for the whole server
    job_kept_s: float = 3600.0  # how long the result of an asynchronous edit can be fetched
    picture_check: PictureCheck | None = None

    @property
    def default_model(self) -> str:
        return next(iter(self.models))


def named_model(text: str, complaint: str) -> tuple[str, str]:
    """NAME=DIR as name and folder. Raises InputError of ``complaint`` for another text."""
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise InputError(complaint)
    return name, folder


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> frozenset[bytes]:
    """Digests of the keys in a file (one a line, # begins a comment) and in IP2P_API_KEYS (commas between them).

    Raises InputError for a file that cannot be read or holds no key: an open server must not come of a slip.
    """
    keys = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    if environment.get(KEYS_VARIABLE) and not any(keys):
        raise InputError(f"{KEYS_VARIABLE}: no key in it; unset it for an open server")
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the keys cannot be read ({error})") from error
        found = [re.split(r"(?:^|\s)#", line)[0].strip() for line in lines]
        if not any(found):
            raise InputError(f"{path}: no key in it; write one a line, or leave --keys out for an open server")
        keys += found
    return frozenset(key_digest(key) for key in keys if key)


def key_digest(key: str) -> bytes:
    """What is kept of a key, and compared: digests are all of one length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_check(name: str) -> PictureCheck:
    """The function that ``module:function`` names. Raises InputError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--check {name}: expected module:function ({error})") from error
    if not callable(found):
        raise InputError(f"--check {name}: {function} cannot be called")
    return found  # type: ignore[no-any-return]
