"""Finding and ending exactly the processes of one Ray head, whatever they call themselves by then.

`ray stop` ends every Ray on a machine, so it is never used. What belongs to a head is told by descent, and, for
processes that outlived their parents, by a mark in the environment or a log file that they hold open. Nothing here
starts a process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

# A head's own processes carry it: Ray hands its environment on to raylet, agents, workers and job entrypoints.
MARK = "IP2P_LOCAL_CLUSTER"


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The living process ``pid`` that began at ``started`` (seconds since 1970); None for a later one of that pid."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1 and is_alive(process):
            return process
    return None


def is_alive(process: psutil.Process) -> bool:
    """False for a zombie: it has ended, though a parent that never asks (a container's pid 1) may keep its entry."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def family(process: psutil.Process) -> set[psutil.Process]:
    """``process`` and everything below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {process, *process.children(recursive=True)}
    return {process}


def strays(folder: Path) -> set[psutil.Process]:
    """Processes of the head in ``folder``, also those whose parents are gone; never the caller."""
    # psutil remembers whom it listed, by pid. Threads take pids too, so on a system with 32,768 of them Ray brings old
    # ones back within minutes, and who is taken for a former process of its pid is never signalled.
    psutil.process_iter.cache_clear()
    return {p for p in psutil.process_iter() if p.pid != os.getpid() and _belongs(p, folder)}


def end(processes: Iterable[psutil.Process], grace_s: float) -> set[psutil.Process]:
    """Ask all, wait ``grace_s`` seconds, then force; returns those still there. A reused pid is never signalled."""
    left = set(processes)
    for signal_it in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                signal_it(process)
        left = _wait(left, grace_s)
    return left


def _wait(processes: set[psutil.Process], timeout_s: float) -> set[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    while (left := {p for p in processes if is_alive(p)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        if process.environ().get(MARK) == str(folder):
            return True
        # A worker renames itself to ray::…, which overwrites the environment that the system shows; its log stays open.
        is_ray = process.name().startswith("ray")
        return is_ray and any(file.path.startswith(f"{folder}/") for file in process.open_files())
    except (psutil.Error, OSError):
        return False  # ended meanwhile, or another user's
