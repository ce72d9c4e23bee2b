"""Real processes of a job under test: its environment, its actors, and how they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """As a user's shell has it: no cluster named, and nothing said about Ray's tokens."""
    unset = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return {name: value for name, value in os.environ.items() if name not in unset}


def wait_until(holds, timeout_s: float, what: str):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def actor_of(driver: subprocess.Popen, name: str) -> psutil.Process | None:
    """A live actor process of this driver whose title names ``name``."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    for child in children:
        try:
            if name in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert not process.is_running()


def ended(process: psutil.Process) -> bool:
    """Whether it runs no more; a zombie that nobody asked for its exit code has ended too."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
