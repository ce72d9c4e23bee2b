"""``manifest.json``: the list of a run's files with their sizes and hashes. Written last, so it says "finished".

The paper has no counterpart. This file does not look inside the tables.
"""

from __future__ import annotations

import json
import re
import typing

from ip2p.errors import DatasetError
from ip2p.schema import SCHEMA_VERSION
from ip2p.storage import Folder, sha256

MANIFEST = "manifest.json"


class FileEntry(typing.TypedDict):
    """What the manifest says of one file. ``rows`` is 0 for a file that is no table."""

    bytes: int
    sha256: str
    rows: int


def file_entry(data: bytes, rows: int = 0) -> FileEntry:
    return {"bytes": len(data), "sha256": sha256(data), "rows": rows}


def write_manifest(folder: Folder, files: dict[str, FileEntry]) -> None:
    """Declare the run in ``folder`` finished, with exactly ``files``."""
    content = {"schema_version": SCHEMA_VERSION, "files": dict(sorted(files.items()))}
    # Sorted, so that entries read back from an earlier run and entries just made give the same bytes.
    folder.write(MANIFEST, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(folder: Folder) -> dict[str, FileEntry]:
    """The files of the finished run in ``folder``, by name.

    Raises DatasetError where there is no manifest (no run there, or an unfinished one) or it cannot be read.
    """
    if not folder.exists(MANIFEST):
        raise DatasetError(_why_no_manifest(folder))
    try:
        content = json.loads(folder.read(MANIFEST))
        version, files = content["schema_version"], content["files"]
        entries = {name: {key: entry[key] for key in ("bytes", "sha256", "rows")} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{folder.uri}/{MANIFEST}: damaged ({error}); run datagen again to rewrite it") from error
    if version != SCHEMA_VERSION:
        raise DatasetError(f"{folder.uri}/{MANIFEST}: schema version {version}; this ip2p reads {SCHEMA_VERSION}")
    return typing.cast(dict[str, FileEntry], entries)


def _why_no_manifest(folder: Folder) -> str:
    place = f"{folder.uri}/{MANIFEST}"
    if folder.list("ledger/"):
        return f"{place} is missing: the run has not finished; run the same command again and it will go on"
    return f"{place} is missing: this is not the folder of a run; pass the folder that datagen or an import wrote to"


def table_files(files: dict[str, FileEntry], kind: str) -> list[str]:
    """Names of the ``ledger`` or ``pairs`` files in shard order (by number: a sixth digit must not sort first)."""
    names = [name for name in files if name.startswith(f"{kind}/")]
    return sorted(names, key=lambda name: (int((re.findall(r"part-(\d+)", name) or ["0"])[0]), name))


def read_listed(folder: Folder, name: str, entry: FileEntry) -> bytes:
    """The bytes of a file that the manifest lists; DatasetError if they are not the bytes that were written."""
    if not folder.exists(name):
        raise DatasetError(f"{folder.uri}/{name}: missing, though the manifest lists it; copy it again or rerun")
    data = folder.read(name)
    if len(data) != entry["bytes"]:
        raise DatasetError(f"{folder.uri}/{name}: {len(data)} bytes, the manifest says {entry['bytes']}; copy it again")
    if sha256(data) != entry["sha256"]:
        raise DatasetError(f"{folder.uri}/{name}: its SHA-256 is not the manifest's; it was altered, copy it again")
    return data
