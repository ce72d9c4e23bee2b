"""What a job says when it cannot go on."""

from __future__ import annotations


def one_error(said: str) -> str:
    """The one line on stderr that names the error; nothing else may look like one."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]
