"""Running a command beside servers that live as long as it does, and ending both whatever signal comes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import types
from collections.abc import Iterator, Mapping, Sequence

import psutil

from cluster import processes
from ip2p.errors import InputError


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Its exit code, 128 + signal where one ended it, as in a shell. When we are asked to end, it has 10 s to leave."""
    with _child(command, environment) as child:
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def signals_unwind() -> Iterator[None]:
    """TERM and HUP unwind the stack as Ctrl-C does, so that what was started is ended."""
    before = {number: signal.signal(number, _exit_by_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the processes behind: signals that come meanwhile wait for the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _child(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        child = subprocess.Popen(list(command), env=dict(environment))
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run: {error.strerror}") from error
    try:
        yield child
    finally:
        with signals_held():
            processes.end([psutil.Process(child.pid)] if child.poll() is None else [], grace_s=10)
            child.wait()


def _exit_by_signal(number: int, frame: types.FrameType | None) -> None:
    raise SystemExit(128 + number)
