"""The family's edit model: trained by jobs/train.py as any other, and taken in here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ip2p.errors import CheckpointError
from ip2p.models.checkpoint import MANIFEST, verify_manifest


def take_in_edit_model(made: Path, family: Path) -> None:
    """Copy the exported model ``made`` to ``family/edit_model``, in place of the one that is there.

    Autoencoder and text encoder are those of the text-to-image model: files with the same bytes become links to it.
    Raises CheckpointError where ``made`` is no exported model or a file of it is not as its manifest says.
    """
    if not (made / MANIFEST).is_file():
        raise CheckpointError(f"{made}: found no {MANIFEST}, expected a model of jobs/train.py (OUTPUT/model)")
    verify_manifest(made, remedy="export it again")
    target, twin = family / "edit_model", family / "text_to_image"
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        name = path.relative_to(made)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (twin / name).is_file() and (twin / name).read_bytes() == path.read_bytes():
            (target / name).symlink_to(Path(os.path.relpath(twin, (target / name).parent)) / name)
        else:
            shutil.copyfile(path, target / name)
