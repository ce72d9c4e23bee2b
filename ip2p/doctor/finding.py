"""One thing that was looked at, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

FINE, WARNING, ERROR = "fine", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """``level``: FINE, WARNING (it works, but not as well as it could) or ERROR (it will not work)."""

    name: str
    level: str
    found: str
    remedy: str = ""


def fine(name: str, found: str) -> Finding:
    return Finding(name, FINE, found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, WARNING, found, remedy)


def error(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, ERROR, found, remedy)
