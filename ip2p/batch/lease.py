"""Who may work on a job: one submission at a time, held by writing a small file again and again.

Clocks of machines are not compared: whoever wants a lease that is held watches it, and takes it over when it has not
changed for as long as it promises to be renewed. A holder that finds another's name in it stops. Outputs do not depend
on any of this, as each is written once whoever comes first; the lease only spares doing work twice.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path

from ip2p.batch.places import LEASE
from ip2p.errors import JobError, StorageError
from ip2p.storage import Folder

HELD_S = 20.0
"""A lease that was not renewed for so long is free."""
RENEW_S = 5.0
LOOK_S = 1.0


class Lease:
    """The right to work on the job in ``folder``; ``acquire`` it, look at ``check``, ``release`` it."""

    def __init__(self, folder: Folder, held_s: float = HELD_S, renew_s: float = RENEW_S):
        self.folder, self.held_s, self.renew_s = folder, held_s, renew_s
        self.fence = 0  # how many submissions had it before, and this one
        self.lost = ""
        self._me = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "name": secrets.token_hex(8)}
        self._version: str | None = None
        self._renewals = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, say: Callable[[str], object]) -> None:
        """Wait until it is free, saying once for whom; then keep it. Raises StorageError where it cannot be read."""
        watched: tuple[str, float] | None = None
        while True:
            data, version = self._read()
            held = json.loads(data) if data else None
            if held is None or held.get("released") or self._is_dead(held):
                if self._take(held, version):
                    break
                continue
            if watched is None or watched[0] != version:
                if watched is None:
                    whose = f"process {held['pid']} on {held['host']}"
                    say(
                        f"another submission works on this job ({whose}); waiting until it ends, or has been silent "
                        f"for {self.held_s:g} s"
                    )
                watched = (typing.cast(str, version), time.monotonic())
            elif time.monotonic() - watched[1] > self.held_s and self._take(held, version):
                say(f"the submission on {held['host']} has been silent for {self.held_s:g} s; taking over")
                break
            time.sleep(LOOK_S)
        self._thread = threading.Thread(target=self._renew, name="ip2p-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise JobError where somebody else has it now."""
        if self.lost:
            raise JobError(self.lost)

    def release(self) -> None:
        """Let others have it at once."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            if not self.lost and self._version is not None and not self._let_go() and self._is_mine():
                self._let_go()  # of the version that a renewal wrote whose answer was lost

    def _let_go(self) -> bool:
        return self.folder.write_if(LEASE, self._content(released=True), self._version) is not None

    def _read(self) -> tuple[bytes, str | None]:
        try:
            return self.folder.read_versioned(LEASE)
        except StorageError as error:
            if error.kind != "missing":
                raise
            return b"", None

    def _is_dead(self, held: dict[str, typing.Any]) -> bool:
        """Whether its holder was a process of this machine that is no more: then nobody need wait."""
        here = held["host"] == self._me["host"] and held["boot"] == self._me["boot"]
        return here and not Path(f"/proc/{held['pid']}").exists()

    def _take(self, held: dict[str, typing.Any] | None, version: str | None) -> bool:
        self.fence = (held["fence"] if held else 0) + 1
        self._version = self.folder.write_if(LEASE, self._content(), version)
        return self._version is not None or self._is_mine()

    def _is_mine(self) -> bool:
        """A write whose answer was lost on the way is told as refused when it is tried again."""
        data, version = self._read()
        mine = bool(data) and json.loads(data)["name"] == self._me["name"]
        self._version = version if mine else None
        return mine

    def _content(self, released: bool = False) -> bytes:
        self._renewals += 1
        held = {**self._me, "fence": self.fence, "renewals": self._renewals, "held_s": self.held_s}
        return json.dumps({**held, "released": released}, sort_keys=True).encode()

    def _renew(self) -> None:
        """A store that is away for a while takes the lease from nobody: others cannot write it either."""
        while not self._end.wait(self.renew_s):
            try:
                version = self.folder.write_if(LEASE, self._content(), self._version)
                if version is not None:
                    self._version = version
                elif not self._is_mine():
                    self.lost = "another submission has taken this job over; this one stops and leaves the rest to it"
                    return
            except StorageError:
                continue


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
