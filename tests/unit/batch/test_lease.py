"""Who may work on a job: one submission at a time, on the disk and on S3, whatever happens to those before it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from small_batch import FailingFolder, until

from ip2p.batch.lease import Lease
from ip2p.batch.places import LEASE
from ip2p.errors import JobError, StorageError
from ip2p.storage import Folder, LocalFolder

NEVER = 1e6


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ip2p.batch.lease.LOOK_S", 0.01)


class Submission:
    """Someone who wants the lease and says what it is told."""

    def __init__(self, folder: Folder, held_s: float = NEVER, renew_s: float = NEVER):
        self.lease = Lease(folder, held_s, renew_s)
        self.said: list[str] = []
        self.thread = threading.Thread(target=lambda: self.lease.acquire(self.said.append), daemon=True)

    def acquire(self) -> Submission:
        self.thread.start()
        self.thread.join(20)
        assert self.has_it, self.said
        return self

    @property
    def has_it(self) -> bool:
        return self.thread.ident is not None and not self.thread.is_alive()

    def end(self) -> None:
        """Its process dies: it neither renews nor releases any more."""
        self.lease._end.set()
        if self.lease._thread is not None:
            self.lease._thread.join()


@pytest.fixture
def submissions() -> Iterator[list[Submission]]:
    """All of them end with the test; those that still wait get it one after the other."""
    made: list[Submission] = []
    yield made
    for one in made:
        one.end()
    while any(one.thread.is_alive() for one in made):
        for one in made:
            if one.has_it:
                one.lease.release()
        time.sleep(0.01)


@pytest.fixture
def submit(folder: Folder, submissions: list[Submission]):
    def make(held_s: float = NEVER, renew_s: float = NEVER, where: Folder | None = None) -> Submission:
        submissions.append(Submission(where or folder, held_s, renew_s))
        return submissions[-1]

    return make


def held(folder: Folder) -> dict[str, object]:
    return json.loads(folder.read(LEASE))


def write_lease(folder: Folder, **changes: object) -> None:
    """A lease that someone on another machine has."""
    there = {"host": "elsewhere", "boot": "b", "pid": 1, "name": "n", "fence": 4, "renewals": 1, "held_s": 20.0}
    folder.write(LEASE, json.dumps({**there, "released": False, **changes}).encode())


def test_a_free_lease_is_taken_at_once(folder, submit):
    one = submit().acquire()
    assert one.said == []
    assert one.lease.fence == 1
    one.lease.check()
    there = held(folder)
    assert (there["host"], there["fence"], there["released"]) == (socket.gethostname(), 1, False)


def test_a_released_lease_is_taken_at_once_and_the_fence_rises(folder, submit):
    for fence in (1, 2, 3):
        one = submit().acquire()
        assert (one.said, one.lease.fence) == ([], fence)
        one.lease.release()
        assert held(folder)["released"] is True
        assert held(folder)["fence"] == fence


def test_the_lease_of_a_process_of_this_machine_that_died_is_taken_at_once(tmp_path, submissions):
    program = (
        "import os, sys; from pathlib import Path; from ip2p.batch.lease import Lease\n"
        "from ip2p.storage import LocalFolder\n"
        "Lease(LocalFolder(Path(sys.argv[1]))).acquire(print); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 9
    assert held(LocalFolder(tmp_path))["released"] is False
    submissions.append(Submission(LocalFolder(tmp_path)).acquire())
    assert submissions[0].said == []
    assert submissions[0].lease.fence == 2


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "another boot"}])
def test_a_process_number_says_nothing_of_another_machine_or_another_boot(tmp_path, submissions, other):
    folder = LocalFolder(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = Lease(folder)._me
    write_lease(folder, **{**mine, "pid": gone.pid, "name": "n", **other})
    waiting = Submission(folder, held_s=0.2)
    submissions.append(waiting)
    waiting.acquire()
    assert waiting.said[0].startswith("another submission works on this job")
    assert waiting.lease.fence == 5


def test_who_finds_it_held_says_once_for_whom_it_waits_and_gets_it_when_it_is_released(folder, submit):
    one, two = submit(renew_s=0.02).acquire(), submit()
    two.thread.start()
    until(lambda: two.said, "the second has said that it waits")
    renewals = held(folder)["renewals"]
    until(lambda: held(folder)["renewals"] > renewals + 5, "a few renewals")
    assert not two.has_it
    one.lease.release()
    two.thread.join(20)
    assert two.has_it
    assert len(two.said) == 1
    assert f"process {one.lease._me['pid']} on {socket.gethostname()}" in two.said[0]
    assert "waiting until it ends, or has been silent for 1e+06 s" in two.said[0]
    assert two.lease.fence == 2


def test_a_lease_that_is_renewed_is_not_taken_over_however_long_it_is_held(folder, submit):
    held_s = 1.5
    one, two = submit(renew_s=0.05).acquire(), submit(held_s=held_s)
    two.thread.start()
    until(lambda: two.said, "the second has said that it waits")
    time.sleep(held_s + 0.3)
    assert not two.has_it
    one.lease.check()
    one.lease.release()
    two.thread.join(20)
    assert two.has_it


def test_a_lease_that_has_been_silent_for_as_long_as_was_said_is_taken_over(folder, submit):
    one = submit().acquire()
    two = submit(held_s=0.3)
    began = time.monotonic()
    two.acquire()
    assert time.monotonic() - began >= 0.3
    assert len(two.said) == 2
    assert two.said[1] == f"the submission on {socket.gethostname()} has been silent for 0.3 s; taking over"
    assert two.lease.fence == one.lease.fence + 1
    assert held(folder)["name"] == two.lease._me["name"]


def test_who_lost_it_is_told_so_at_the_next_renewal_and_leaves_it_alone(folder, submit):
    one = submit(renew_s=0.3).acquire()
    write_lease(folder, name="another")
    until(lambda: one.lease.lost, "the first has noticed")
    with pytest.raises(JobError, match="another submission has taken this job over; this one stops"):
        one.lease.check()
    one.lease.release()
    assert held(folder)["name"] == "another"
    assert held(folder)["released"] is False


def test_who_was_stopped_for_long_does_not_get_it_back_from_whoever_is_done_by_then(folder, submit):
    one = submit(renew_s=0.5).acquire()
    two = submit(held_s=0.05)
    two.acquire()
    two.lease.release()
    until(lambda: one.lease.lost, "the first has noticed")
    assert held(folder)["released"] is True
    assert held(folder)["fence"] == 2


def test_of_many_that_want_a_free_lease_one_gets_it(folder, submit):
    several = [submit() for _ in range(6)]
    for one in several:
        one.thread.start()
    until(lambda: sum(one.has_it or bool(one.said) for one in several) == 6, "all have looked")
    (winner,) = [one for one in several if one.has_it]
    assert held(folder)["name"] == winner.lease._me["name"]
    assert winner.said == []


def test_of_many_that_wait_one_after_the_other_gets_it(folder, submit):
    several = [submit() for _ in range(4)]
    for one in several:
        one.thread.start()
    for fence in (1, 2, 3, 4):
        (holder,) = until(lambda: [one for one in several if one.has_it], "one has it")
        assert holder.lease.fence == fence
        several.remove(holder)
        holder.lease.release()


def test_renewals_are_written_and_each_is_another(folder, submit):
    one = submit(renew_s=0.02).acquire()
    seen = {folder.read_versioned(LEASE)[1]}
    until(lambda: seen.add(folder.read_versioned(LEASE)[1]) or len(seen) > 3, "three renewals")
    one.lease.check()


def test_nothing_is_renewed_after_the_release(folder, submit):
    one = submit(renew_s=0.01).acquire()
    one.lease.release()
    there = folder.read(LEASE)
    time.sleep(0.05)
    assert folder.read(LEASE) == there
    assert not one.lease._thread.is_alive()


def test_a_lease_that_was_never_had_is_released_without_a_word(tmp_path):
    Lease(LocalFolder(tmp_path)).release()
    assert LocalFolder(tmp_path).list() == []


# ---- answers that are lost, stores that are away


def test_a_write_whose_answer_was_lost_still_gives_the_lease(tmp_path, submit):
    folder = FailingFolder(tmp_path)
    folder.lose = 1
    one = submit(where=folder).acquire()
    assert one.lease.fence == 1
    one.lease.release()
    assert held(folder)["released"] is True


def test_a_lost_answer_in_the_race_for_a_silent_lease_still_gives_it(tmp_path, submit):
    folder = FailingFolder(tmp_path)
    write_lease(folder)
    folder.lose = 1
    one = submit(held_s=0.1, where=folder).acquire()
    assert one.lease.fence == 5
    assert held(folder)["name"] == one.lease._me["name"]


def test_a_renewal_whose_answer_was_lost_keeps_the_lease(tmp_path, submit):
    folder = FailingFolder(tmp_path)
    one = submit(renew_s=0.01, where=folder).acquire()
    folder.lose = 3
    until(lambda: folder.lose == 0, "three lost answers")
    renewals = held(folder)["renewals"]
    until(lambda: held(folder)["renewals"] > renewals + 2, "further renewals")
    one.lease.check()
    one.lease.release()
    assert held(folder)["released"] is True


def test_a_store_that_is_away_for_a_while_takes_the_lease_from_nobody(tmp_path, submit):
    folder = FailingFolder(tmp_path)
    one = submit(renew_s=0.01, where=folder).acquire()
    gone = [StorageError("away", "away") for _ in range(5)]
    folder.fails["write_if"] = gone
    until(lambda: not gone, "five renewals that failed")
    renewals = held(folder)["renewals"]
    until(lambda: held(folder)["renewals"] > renewals + 1, "renewals")
    one.lease.check()


def test_a_renewal_that_was_written_but_told_as_an_error_does_not_keep_the_release_from_others(tmp_path):
    class Cut(LocalFolder):
        """The connection breaks when the file is written."""

        cut = False

        def write_if(self, name: str, data: bytes, version: str | None = None) -> str | None:
            written = super().write_if(name, data, version)
            if self.cut:
                raise StorageError("cannot reach the store", "away")
            return written

    folder = Cut(tmp_path)
    lease = Lease(folder, renew_s=0.01)
    lease.acquire(print)
    folder.cut = True
    renewals = held(folder)["renewals"]
    until(lambda: held(folder)["renewals"] > renewals, "a renewal whose answer was an error")
    lease._end.set()
    lease._thread.join()
    folder.cut = False
    lease.release()
    assert held(folder)["released"] is True


@pytest.mark.parametrize("kind", ["denied", "refused", "away", "other"])
def test_a_lease_that_cannot_be_read_is_an_error(tmp_path, kind):
    folder = FailingFolder(tmp_path, {"read_versioned": [StorageError("words", kind)]})
    with pytest.raises(StorageError, match="words"):
        Lease(folder).acquire(print)


def test_an_empty_lease_is_a_free_one(tmp_path, submit):
    folder = LocalFolder(tmp_path)
    folder.write(LEASE, b"")
    assert submit(where=folder).acquire().lease.fence == 1


def test_a_lease_that_was_deleted_while_others_wait_is_free(folder, submit):
    submit().acquire()
    two = submit()
    two.thread.start()
    until(lambda: two.said, "the second has said that it waits")
    folder.delete(LEASE)
    two.thread.join(20)
    assert two.has_it
