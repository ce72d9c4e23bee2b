#!/usr/bin/env python3
"""Ten times more edits than the server can do, for a minute: what it answers, how long the accepted ones take.

    python bench/serving_overload.py --seconds 60

Measured on one replica of serve.app with the shipped model: latency before, answers and p99 during, memory during, and
latency right after. Refused clients do not come back (an open loop), so all of the overload is really sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import typing
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from bench.serving import Side, open_session, served, trace


def replica(side: Side) -> psutil.Process:
    """The process that edits."""
    found = [p for p in psutil.Process(side.pid).children(recursive=True) if "EditReplica" in " ".join(p.cmdline())]
    return found[0]


async def alone(side: Side, count: int) -> dict[str, float]:
    """Seconds of 10-step edits one after the other, and how many edits a second a full server does."""
    async with open_session() as session:
        jobs = [job for _, job in trace(10 * count, 1, 31) if job["num_inference_steps"] == 10][:count]
        took = []
        for job in jobs:
            started = time.monotonic()
            assert await side.edit(session, job)
            took.append(time.monotonic() - started)
        return {"p50_s": sorted(took)[len(took) // 2], "max_s": max(took)}


async def full_rate(side: Side, seconds: float) -> float:
    """Edits a second with 16 always under way."""
    async with open_session() as session:
        jobs, done, ends = iter(trace(100_000, 1, 37)), 0, time.monotonic() + seconds

        async def go_on() -> None:
            nonlocal done
            while time.monotonic() < ends:
                edited = await side.edit(session, next(jobs)[1])
                done += edited  # not in one: others count while this one waits

        await asyncio.gather(*[go_on() for _ in range(16)])
        return done / seconds


async def overload(side: Side, per_s: float, seconds: float) -> dict[str, typing.Any]:
    """Status counts, p99 of the accepted ones, and the replica's memory once a second."""
    answers: Counter[str] = Counter()
    took: list[float] = []
    memory = [replica(side).memory_info().rss]
    async with open_session() as session:
        started = time.monotonic()

        async def one(at: float, job: dict[str, typing.Any]) -> None:
            await asyncio.sleep(max(0, started + at - time.monotonic()))
            sent = time.monotonic()
            try:
                accepted = await side.edit(session, job)
            except Exception as error:
                answers[type(error).__name__ + ": " + str(error)[:80]] += 1
                return
            answers["200" if accepted else "429"] += 1
            if accepted:
                took.append(time.monotonic() - sent)

        async def watch() -> None:
            while True:
                await asyncio.sleep(1)
                memory.append(replica(side).memory_info().rss)

        watching = asyncio.create_task(watch())
        arrivals = [one(*each) for each in trace(int(per_s * seconds), per_s, 41)]
        await asyncio.gather(*arrivals)
        watching.cancel()
        took.sort()
        return {
            "sent": len(arrivals), "answers": dict(answers), "p50_s": took[len(took) // 2],
            "p99_s": took[min(len(took) - 1, int(0.99 * len(took)))], "accepted_per_s": len(took) / seconds,
            "memory_mib": {
                "before": memory[0] >> 20, "highest": max(memory) >> 20,
                "last_third": max(memory[-len(memory) // 3 :]) >> 20,
                "middle_third": max(memory[len(memory) // 3 : 2 * len(memory) // 3] or memory) >> 20,
            },
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of overload (default %(default)s)")
    parser.add_argument("--times", type=float, default=10, help="what the server can do (default %(default)s)")
    parser.add_argument("--queue-limit", type=float, default=10, help="seconds of work that may wait (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="of torch in the server (default %(default)s)")
    parser.add_argument("--port", type=int, default=18760, help="first of four (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder (default %(default)s)")
    args = parser.parse_args()
    with served("ip2p", args) as side:
        found: dict[str, typing.Any] = {"before": asyncio.run(alone(side, 10))}
        found["full_rate_per_s"] = asyncio.run(full_rate(side, 15))
        found["overload"] = asyncio.run(overload(side, args.times * found["full_rate_per_s"], args.seconds))
        found["after"] = asyncio.run(alone(side, 10))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "serving_overload.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
