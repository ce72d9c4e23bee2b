"""Runs of written triplets against a real server that behaves badly, with kills and a cost cap."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ip2p.config import load_recipe
from ip2p.storage import open_folder
from ip2p.triplets import http_writer, written
from ip2p.triplets.answers import Answer, Answers
from ip2p.triplets.assembly import Pacing, http_stage
from ip2p.triplets.captions import CaptionRow
from ip2p.triplets.writing import Writing, WritingRun
from jobs._ray_triplets import WriteTripletShard
from jobs._triplet_stage import take_up
from tests.unit.triplets.faulty_server import COMPLETION_TOKENS, PROMPT_TOKENS, FaultyServer

ROOT = Path(__file__).parents[3]
PRICES = {"prompt_price": 1000.0, "completion_price": 2000.0}  # of a million tokens: 0.08 an answer
ANSWER_COST = (PROMPT_TOKENS * 1000 + COMPLETION_TOKENS * 2000) / 1e6
CAPTIONS = [f"A photo of object number {n} on a table" for n in range(60)]


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http_writer, "_backoff_s", lambda attempt: 0.01)


@pytest.fixture
def server():
    server = FaultyServer(slow_s=0.05)
    yield server
    server.close()


def run_of(url: str, **writing) -> WritingRun:
    settings = [f"triplets.http_url={url}", "triplets.writer=http", "triplets.tries=3", "triplets.max_tokens=64"]
    writing = {"types": "none", "near_duplicate": 0.0, "captions_per_shard": 16, **PRICES, **writing}
    return WritingRun(load_recipe("postcard", settings), Writing(**writing))


def rows_of(captions=CAPTIONS) -> list[CaptionRow]:
    return [CaptionRow(i, f"{i:016x}", i + 1, caption) for i, caption in enumerate(captions)]


def write_all(folder, run: WritingRun, pacing: Pacing = Pacing(), retry_errors: bool = False) -> dict:  # noqa: B008
    """The job with its actor in this process."""
    shards = take_up(run, folder, rows_of(), retry_errors)
    actor = WriteTripletShard(run, pacing, folder.uri)
    for shard in shards:
        actor.write(shard.name, shard.rows)
    return written.finish(folder, run.writing, 0.0)


def billed(server: FaultyServer) -> float:
    prompt, completion = server.billed_tokens
    return (prompt * PRICES["prompt_price"] + completion * PRICES["completion_price"]) / 1e6


def spent(folder, run: WritingRun) -> float:
    """What a run that goes on in ``folder`` starts from."""
    return http_stage(run, Pacing(), folder).writer.budget.spent


def test_a_bad_server_costs_tries_and_no_captions(server, tmp_path):
    summary = write_all(open_folder(str(tmp_path)), run_of(server.url))
    assert set(server.by_fault) == {"ok", "slow", "429", "500", "malformed", "empty", "unparseable"}
    assert summary["captions"] == summary["asked_for"] == sum(summary["by_reason"].values()) == len(CAPTIONS)
    assert summary["by_reason"]["ok"] >= 0.9 * len(CAPTIONS)
    assert set(summary["by_reason"]) <= {"ok", "empty", "unparseable"}
    assert summary["refused_tries"]["empty"] == server.by_fault["empty"]
    assert summary["refused_tries"]["unparseable"] == server.by_fault["unparseable"]
    # Whole answers cost what the server says; garbled ones might have cost the most.
    whole = sum(server.answered.values())
    assert summary["completion_tokens"] == COMPLETION_TOKENS * whole
    assert summary["cost"] >= ANSWER_COST * whole
    assert not open_folder(str(tmp_path)).list("answers/")


def test_run_again_asks_nobody_and_leaves_the_same_files(server, tmp_path):
    folder = open_folder(str(tmp_path))
    write_all(folder, run_of(server.url))
    before = {name: folder.read(name) for name in folder.list()}
    requests = sum(server.asked.values())
    write_all(folder, run_of(server.url))
    assert sum(server.asked.values()) == requests
    assert {name: folder.read(name) for name in folder.list()} == before


def test_the_cost_cap_holds_and_a_higher_one_goes_on(server, tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(server.url)
    summary = write_all(folder, run, Pacing(max_cost=2.0, concurrency=4))
    assert 1.5 < billed(server) <= summary["cost"] <= 2.0
    assert summary["by_reason"]["over_budget"] > 20
    assert sum(summary["by_reason"].values()) == len(CAPTIONS)
    asked = sum(server.asked.values())
    write_all(folder, run, Pacing(max_cost=2.0))
    assert sum(server.asked.values()) == asked
    summary = write_all(folder, run, Pacing(max_cost=50.0), retry_errors=True)
    assert "over_budget" not in summary["by_reason"]
    assert summary["cost"] <= 50.0
    assert max(server.answered.values()) == 1


@pytest.fixture
def faultless():
    """Answers everything, each time with another edit."""
    numbers = itertools.count()

    def answer(prompt: str) -> str:
        return f"add lantern {(number := next(numbers))}\n%%\nlantern {number} at night\nEND"

    server = FaultyServer(answer, faults=False)
    yield server
    server.close()


def test_a_copy_beside_one_that_failed_is_paid_and_counted_once(faultless, tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(faultless.url, per_caption=2)
    reasons = write_all(folder, run, Pacing(max_cost=1.0, concurrency=1))["by_reason"]
    assert (reasons["ok"], reasons["over_budget"]) == (11, 109)  # the sixth caption's second copy is not paid for
    assert spent(folder, run) == pytest.approx(billed(faultless)) == pytest.approx(11 * ANSWER_COST)
    assert len(folder.list("answers/")) == 11 % 2
    summary = write_all(folder, run, Pacing(concurrency=1), retry_errors=True)
    assert summary["by_reason"] == {"ok": 120}
    assert summary["cost"] == pytest.approx(billed(faultless)) == pytest.approx(120 * ANSWER_COST)
    assert spent(folder, run) == pytest.approx(billed(faultless))


class Killed(BaseException):
    pass


def test_an_actor_killed_while_it_clears_up_pays_nothing_when_it_is_called_again(faultless, tmp_path, monkeypatch):
    folder, run = open_folder(str(tmp_path)), run_of(faultless.url)
    (shard,) = written.plan(rows_of(CAPTIONS[:8]), run.writing, set())

    def killed_midway(answers, finished):
        for name in folder.list("answers/")[:4]:
            folder.delete(name)
        raise Killed

    actor = WriteTripletShard(run, Pacing(), folder.uri)
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "forget_all_of", killed_midway)
        with pytest.raises(Killed):
            actor.write(shard.name, shard.rows)
    assert len(folder.list("answers/")) == 4
    assert spent(folder, run) == pytest.approx(billed(faultless))
    told = WriteTripletShard(run, Pacing(), folder.uri).write(shard.name, shard.rows)
    assert (told.captions, told.accepted, told.cost) == (8, 8, pytest.approx(8 * ANSWER_COST))
    assert sum(faultless.asked.values()) == 8
    assert not folder.list("answers/")


def test_what_a_kill_left_to_clear_up_goes_when_the_run_is_looked_at_again(faultless, tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(faultless.url)
    write_all(folder, run)
    Answers(folder).put((rows_of()[-1].prompt_id, 0, 0), Answer("x", 1, 1, 0.5))
    write_all(folder, run)
    assert not folder.list("answers/")


CHILD = """
import sys
sys.path.insert(0, {root!r})
from ip2p.storage import open_folder
from ip2p.triplets import http_writer
from tests.unit.triplets.test_writing_over_http import run_of, write_all
http_writer._backoff_s = lambda attempt: 0.01
write_all(open_folder({folder!r}), run_of({url!r}))
"""


def child(folder: Path, url: str) -> subprocess.Popen:
    code = CHILD.format(root=str(ROOT), folder=str(folder), url=url)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(holds, seconds=60.0):
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


def test_killed_and_run_again_no_answered_request_is_sent_twice(tmp_path):
    server = FaultyServer(slow_s=0.01)
    delivered, cut_off = set(), set()
    try:
        for stop_at in (10, 35):
            process = child(tmp_path, server.url)
            wait_until(lambda stop_at=stop_at: sum(server.answered.values()) >= stop_at)
            server.gate.clear()  # what is asked from now on gets no answer
            time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            process.wait()
            cut_off |= set(server.keys) - set(server.answered)  # answers to a dead process are nobody's
            delivered |= set(server.answered) - cut_off
            server.gate.set()
        assert len(delivered) >= 35 - 2 * len(cut_off)  # one that was cut off is no longer counted, and may count twice
        assert len(delivered) > 10, "nothing was delivered to the second"
        assert child(tmp_path, server.url).wait() == 0
        assert {server.answered[key] for key in delivered} == {1}
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["captions"] == summary["asked_for"] == len(CAPTIONS)
        assert summary["cost"] >= ANSWER_COST * len(server.answered)
    finally:
        server.close()


def test_what_was_under_way_at_a_kill_counts_as_spent(tmp_path):
    folder = open_folder(str(tmp_path))
    server = FaultyServer(faults=False)
    try:
        server.gate.clear()
        stage = http_stage(run_of(server.url), Pacing(concurrency=4), folder)
        threading.Thread(target=stage, args=(rows_of()[:4],), daemon=True).start()
        wait_until(lambda: sum(server.asked.values()) == 4)
        reserved = Answers(folder).cost()
        assert reserved >= 4 * ANSWER_COST
        again = http_stage(run_of(server.url), Pacing(), folder)
        assert again.writer.budget.spent == pytest.approx(reserved)
    finally:
        server.close()
