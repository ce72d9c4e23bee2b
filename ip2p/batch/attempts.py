"""How often items have been tried in vain, kept beside the outputs so that a restart does not forgive them.

Trying in vain is rare, so each time is a small file of its own, whose name says all.
"""

from __future__ import annotations

import re

from ip2p.batch.places import ATTEMPTS
from ip2p.storage import Folder


def note_attempt(folder: Folder, key: str, count: int) -> None:
    """The item ``key`` has now failed ``count`` times."""
    folder.write(f"{ATTEMPTS}{key}-{count}", b"")


def load_attempts(folder: Folder) -> dict[str, int]:
    """Attempts by key, of the items that have any."""
    found: dict[str, int] = {}
    for name in folder.list(ATTEMPTS):
        if parts := re.fullmatch("([0-9a-f]{32})-([0-9]+)", name.removeprefix(ATTEMPTS)):
            found[parts[1]] = max(found.get(parts[1], 0), int(parts[2]))
    return found
