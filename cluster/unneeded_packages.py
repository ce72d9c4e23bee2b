"""Print the packages of this Python that the project does not run with, one a line: those of its tests and its tools.

    python unneeded_packages.py pyproject.toml [EXTRA …]

requirements.lock pins one environment for all; an image leaves out what only development wants.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: Iterable[str], extras: Iterable[str] = ("",)) -> set[str]:
    """Names of all installed packages that ``requirements`` lead to, with the extras that each asks for."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(text, extra) for text in requirements for extra in extras]
    while waiting:
        text, asked_by = waiting.pop()
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                waiting += [(each, extra) for each in importlib.metadata.requires(name) or []]
            except importlib.metadata.PackageNotFoundError:
                continue  # meant for another system
            found.add(name)
    return found


def unneeded(project: Path, extras: Sequence[str]) -> list[str]:
    """Installed packages that neither ``project`` nor one of its ``extras`` leads to, sorted."""
    table = tomllib.loads(project.read_text())["project"]
    wanted = [*table["dependencies"], *(each for extra in extras for each in table["optional-dependencies"][extra])]
    installed = {canonicalize_name(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    return sorted(installed - needed(wanted) - {canonicalize_name(table["name"])})


if __name__ == "__main__":
    print("\n".join(unneeded(Path(sys.argv[1]), sys.argv[2:])))
