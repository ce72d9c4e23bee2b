"""Python, disk, shared memory and ports of this machine."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ip2p.doctor.finding import Finding, error, fine, warning

GIB = 2**30
NEEDED_DISK = 2 * GIB
NEEDED_SHARED = 1 * GIB


def check_python(version: Sequence[int] = tuple(sys.version_info[:3]), system: str = sys.platform) -> Finding:
    found = f"{'.'.join(map(str, version))} on {system} {platform.machine()}"
    if tuple(version[:2]) < (3, 11):
        return error("python", found, "use Python 3.11 or newer: make PYTHON=python3.12 env")
    if system != "linux":
        return warning("python", found, "only Linux is tested; use a container or a virtual machine")
    return fine("python", found)


def check_disk(folder: Path, needed: int = NEEDED_DISK) -> Finding:
    """Whether ``folder``, or the next one above it that exists, can be written to and has ``needed`` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{place}: {free / GIB:.1f} GiB free"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        full = refused.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if full else "change its rights, or name another folder"
        return error("disk", f"{found}, cannot be written ({refused.strerror})", f"{remedy}: --output DIR")
    if free < needed:
        return error("disk", found, f"free {(needed - free) / GIB:.1f} GiB more, or name another folder: --output DIR")
    return fine("disk", found)


def check_shared_memory(folder: Path = Path("/dev/shm"), needed: int = NEEDED_SHARED) -> Finding:
    """Ray keeps objects there; where it is small, Ray falls back to the disk and is ten times slower."""
    if not folder.is_dir():
        return warning("shared memory", f"there is no {folder}", "in a container: docker run --shm-size=4g")
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < needed:
        remedy = (
            "in a container: docker run --shm-size=4g, or an emptyDir with medium: Memory; else remove what fills it"
        )
        return warning("shared memory", found, remedy)
    return fine("shared memory", found)


def check_port(port: int, host: str = "127.0.0.1") -> Finding:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as refused:
            taken = refused.errno == errno.EADDRINUSE
            why = "is taken by another process" if taken else f"cannot be used ({refused.strerror})"
            return error("port", f"{port} {why}", "end that process, or take another: --port N")
    return fine("port", f"{port} is free")
