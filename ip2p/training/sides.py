"""Which pairs must not be mirrored: those whose texts name a side, a turn or something written.

The original mirrors them as well, and so teaches that left and right are the same word.
"""

from __future__ import annotations

import re

SIDED = re.compile(
    r"""\b(
      (left|right)(most|wards?|hand(ed)?)?
    | (north|south)?(east|west)(ern|erly|wards?|bound)?
    | (anti|counter)?-?clockwise
    | mirror(s|ed|ing)? | flip(s|ped|ping)? | reversed
    | text | letter(s|ing)? | writing | written | words? | says | saying | spell(s|ing)? | logo
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


def names_a_side(*texts: str) -> bool:
    """Whether any of ``texts`` would be wrong, or might be, about the mirrored picture."""
    return any(SIDED.search(text) for text in texts)
