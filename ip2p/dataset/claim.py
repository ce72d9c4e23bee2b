"""Whose folder is this? An export or import leaves a note, so that it can be run again but never mix with another.

Without it, a second export into the same folder would leave directories of the first among its own. This file only
guards; it removes nothing.
"""

from __future__ import annotations

import json
import typing

from ip2p.errors import InputError
from ip2p.storage import Folder


def claim(output: Folder, note: str, identity: dict[str, typing.Any]) -> None:
    """Take ``output`` for the work that ``identity`` describes, by writing the file ``note`` there first.

    Free to take: a folder that is empty (but for such a note), or one that the same work claimed before, so that it
    can be run again after a stop. Raises InputError for any other.
    """
    data = (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode()
    if output.exists(note) and output.read(note) == data:
        return
    others = [name for name in output.list() if name != note]
    if others:
        found = f"{others[0]} and {len(others) - 1} more files"
        raise InputError(f"{output.uri}: holds something else ({found}); choose an empty folder, or empty it first")
    output.write(note, data)
