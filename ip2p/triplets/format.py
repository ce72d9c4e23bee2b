"""The text format between a caption and the language model that writes its edit (paper, section 3.1).

A prompt is a caption and a delimiter; a completion is an instruction, a delimiter, the edited caption and a stop mark.
The marks are those of the original, so that models and files made for it can be used as they are. This file neither
samples text nor decides whether a triplet is good enough.
"""

from __future__ import annotations

from ip2p.schema import Triplet

DELIMITER_0 = "\n##\n"
"""Ends the caption in a prompt."""
DELIMITER_1 = "\n%%\n"
"""Stands between instruction and edited caption in a completion."""
STOP = "\nEND"
"""Ends a completion."""


def prompt_of(caption: str) -> str:
    """What the language model is asked to continue."""
    return caption + DELIMITER_0


def completion_of(triplet: Triplet) -> str:
    """The continuation that a fine-tuned model should write for ``prompt_of(triplet.caption)``."""
    return triplet.instruction + DELIMITER_1 + triplet.edited_caption + STOP


def until_stop(text: str) -> str:
    """``text`` up to the first stop mark, or all of it."""
    return text.partition(STOP)[0]


def parse_completion(text: str) -> tuple[str, str] | None:
    """Instruction and edited caption, stripped; None unless the text before STOP has exactly these two parts.

    The format cannot hold an edited caption that begins with ``END``: with the delimiter's line break that is STOP.
    """
    parts = until_stop(text).split(DELIMITER_1)
    if len(parts) != 2:
        return None
    return parts[0].strip(), parts[1].strip()
