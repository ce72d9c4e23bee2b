"""What all jobs say and read alike on the command line: folders, ranges, quietness, and how an error ends them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ip2p.config import EMBEDDED
from ip2p.errors import InputError, Ip2pError, JobError
from ip2p.storage import Folder

GPU_FLAGS = ("gpus_per_worker", "painter_gpus", "writer_gpus")  # None: as many as there are


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """``--quiet`` and ``--json``."""
    parser.add_argument("--quiet", action="store_true", help="no progress, only errors and the result")
    parser.add_argument("--json", action="store_true", help="progress and result as JSON lines")


def size_range(text: str) -> tuple[int, int]:
    """``2`` or ``1:4`` from the command line."""
    low, _, high = text.partition(":")
    try:
        size = (int(low), int(high or low))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wants MIN:MAX, got {text!r}") from None
    if not 1 <= size[0] <= size[1]:
        raise argparse.ArgumentTypeError(f"wants 1 <= MIN <= MAX, got {text!r}")
    return size


def located(output: str) -> str:
    """``output`` as every worker will understand it: an absolute path or a URL.

    Raises InputError inside the unpacked copy that ``ray job submit --working-dir`` works in: Ray deletes it.
    """
    if "://" in output:
        return output
    path = Path(output).absolute()
    if "_ray_pkg_" in str(path):
        raise InputError(f"{output} would lie in Ray's temporary copy; give an absolute path or s3://…")
    return str(path)


def located_model(model: str) -> str:
    """A model's folder likewise; ``embedded`` stays what it is."""
    return model if model == EMBEDDED else str(Path(model).expanduser().absolute())


def check_ours(folder: Folder, ours: str, *theirs: str) -> None:
    """Raise InputError where ``folder`` was not begun by us (no file ``ours``) and holds one of ``theirs``."""
    if folder.exists(ours):
        return
    for name in theirs:
        if folder.exists(name):
            raise InputError(f"{folder.uri}: holds something else ({name}); choose another --output")


def look_around(args: argparse.Namespace, gpu_gib: float = 0.0) -> None:
    """Say on stderr what the doctor warns of here. Raises JobError for what it knows to fail."""
    from ip2p.doctor.finding import ERROR, WARNING
    from ip2p.doctor.start import start_findings, told

    asked = vars(args)
    gpus = [asked[name] for name in GPU_FLAGS if name in asked]
    # On a cluster the work is done elsewhere; there each worker says what it meets.
    here = not (os.environ.get("RAY_ADDRESS") or asked.get("via_serve"))
    wanted = not gpus or any(each != 0 for each in gpus)
    found = list(start_findings(str(asked.get("output", "")), here and wanted, gpu_gib))
    for one in found:
        if one.level == WARNING and not asked.get("quiet"):
            print(f"warning: {told(one)}", file=sys.stderr)
    if errors := [told(one) for one in found if one.level == ERROR]:
        raise JobError("\nerror: ".join(errors))


def ended(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, gpu_gib: float = 0.0) -> int:
    """The exit code of ``run``; an Ip2pError is said in one line and gives 1.

    The quick part of `ip2p doctor` comes first; ``gpu_gib`` is about what the work takes of a GPU.
    """
    try:
        look_around(args, gpu_gib)
        return run(args)
    except Ip2pError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
