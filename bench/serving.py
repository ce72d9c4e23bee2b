#!/usr/bin/env python3
"""Serving beside what else one could run: the same model, requests, threads and client, one server after the other.

    python bench/serving.py --seconds 60 --output docs/figures

Sides: diffusers behind Ray Serve one at a time, behind Ray Serve's @serve.batch, behind LitServe
(bench/serving_peers.py, bench/serving_litserve.py), and this project's serve.app. Requests arrive at random (Poisson,
from a fixed seed) and do not wait for answers. First the one-at-a-time side's capacity is measured; then each side gets
0.7 times and 3 times that. Edits have 10, 20 or 50 steps (0.3 : 0.5 : 0.2), half the default scales, 15 % s_I = 1, the
others scales of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import psutil

from cluster.head import Cluster, Size, environment, start, stop
from ip2p.images import encode_image
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.renderer import render

ROOT = Path(__file__).resolve().parent.parent
STEPS, SHARES = (10, 20, 50), (0.3, 0.5, 0.2)
INSTRUCTIONS = ("make it night", "add a rainbow", "turn it into a castle", "make it a pencil sketch", "put it on snow")
SIDES = ("one at a time", "serve.batch", "LitServe", "ip2p")
DEFAULT_SCALES = (2.0, 2.0)
Job = dict[str, typing.Any]


def trace(count: int, per_s: float, seed: int) -> list[tuple[float, Job]]:
    """Arrival times and jobs, the same for every side."""
    draw = random.Random(seed)
    pictures = [base64.b64encode(encode_image(render(scene_of(91, k, None), 64))).decode() for k in range(16)]
    at, jobs = 0.0, []
    for number in range(count):
        at += draw.expovariate(per_s)
        kind = draw.random()
        own = (round(draw.uniform(1.5, 8), 2), round(draw.uniform(1.1, 2.5), 2))
        scales = DEFAULT_SCALES if kind < 0.5 else (2.0, 1.0) if kind < 0.65 else own
        jobs.append((at, {
            "image": draw.choice(pictures), "prompt": draw.choice(INSTRUCTIONS), "seed": number,
            "num_inference_steps": draw.choices(STEPS, SHARES)[0],
            "guidance_scale": scales[0], "image_guidance_scale": scales[1],
        }))  # fmt: skip
    return jobs


# ---- the sides


@contextmanager
def served(side: str, args: argparse.Namespace) -> Iterator[Side]:
    """A running server of ``side``, warm; ended afterwards with all that belongs to it."""
    port = args.port + SIDES.index(side)
    if side == "LitServe":
        command = [sys.executable, str(ROOT / "bench" / "serving_litserve.py"), str(port), str(args.threads)]
        process = subprocess.Popen(
            command, env=bench_environment(args), stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield warm(Side(side, f"http://127.0.0.1:{port}", process.pid))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
        return
    with local_ray(args, Size(num_cpus=4, num_gpus=0, object_store_mb=200)) as (ray_environment, cluster):
        config = cluster.folder / "bench.yaml"
        config.write_text(json.dumps(_config(side, port, args)))
        subprocess.run([script("serve"), "deploy", str(config)], env=ray_environment, check=True, cwd=ROOT)
        yield warm(Side(side, f"http://127.0.0.1:{port}", cluster.pid))


def _config(side: str, port: int, args: argparse.Namespace) -> dict[str, typing.Any]:
    if side == "ip2p":
        app = {"import_path": "serve.app:app", "args": {
            "min_replicas": 1, "max_replicas": 1, "num_cpus": args.threads,
            "queue_limit_s": getattr(args, "queue_limit", 600.0),
        }}  # fmt: skip
    else:
        batching = "yes" if side == "serve.batch" else "no"
        app = {
            "import_path": "bench.serving_peers:serve_app",
            "args": {"batching": batching, "threads": str(args.threads)},
        }
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "bench", "route_prefix": "/", **app}],
    }


@contextmanager
def local_ray(args: argparse.Namespace, size: Size) -> Iterator[tuple[dict[str, str], Cluster]]:
    """A private cluster whose replicas can import this file's neighbours, and the environment of its clients."""
    before = dict(os.environ)
    os.environ.update(bench_environment(args))
    try:
        cluster = start(size)
        try:
            yield environment(cluster), cluster
        finally:
            stop(cluster)
    finally:
        os.environ.clear()
        os.environ.update(before)


def bench_environment(args: argparse.Namespace) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": str(args.threads), "RAY_worker_niceness": "0"}
    return os.environ | threads | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


class Side:
    """One server: how to ask it, and what it has used."""

    def __init__(self, name: str, url: str, pid: int):
        self.name, self.url, self.pid = name, url, pid

    async def edit(self, session: aiohttp.ClientSession, job: Job) -> bool:
        """One edit; False where it was refused. Raises for any other answer."""
        if self.name != "ip2p":
            path = "/predict" if self.name == "LitServe" else "/"
            async with session.post(self.url + path, json=job) as answer:
                body = await answer.json(content_type=None)
                return answer.status == 200 and bool(body["image"])
        form = aiohttp.FormData()
        form.add_field("image", base64.b64decode(job["image"]), filename="in.png", content_type="image/png")
        for name, value in job.items():
            if name != "image":
                form.add_field(name, str(value))
        async with session.post(self.url + "/v1/images/edits", data=form) as answer:
            body = await answer.json()
            if answer.status not in (200, 429):
                raise RuntimeError(f"{self.name}: {answer.status} {body}")
            return answer.status == 200 and bool(body["data"][0]["b64_json"])

    async def rows(self, session: aiohttp.ClientSession) -> int:
        """UNet rows run so far."""
        if self.name == "ip2p":
            async with session.get(self.url + "/metrics") as answer:
                lines = (await answer.text()).splitlines()
            return int(sum(float(line.split()[-1]) for line in lines if line.startswith("ip2p_row_evals_total")))
        if self.name == "LitServe":
            async with session.post(self.url + "/predict", json={"stats": 1}) as answer:
                return int((await answer.json())["rows"])
        async with session.get(self.url + "/stats") as answer:
            return int((await answer.json(content_type=None))["rows"])

    def cpu_s(self) -> float:
        """CPU seconds of the server and everything that it started."""
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        total = 0.0
        for process in processes:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return total


def warm(side: Side) -> Side:
    """Wait until it edits, and let each number of steps be run once."""

    async def first() -> None:
        async with open_session() as session:
            deadline = time.monotonic() + 300
            for _, job in trace(6, 1, 5):
                while True:
                    try:
                        if await side.edit(session, job):
                            break
                    except (aiohttp.ClientError, json.JSONDecodeError, RuntimeError, KeyError, TypeError):
                        pass
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{side.name} does not answer")
                    await asyncio.sleep(1)

    asyncio.run(first())
    return side


def open_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=3600), connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


# ---- measuring


async def capacity(side: Side, seconds: float) -> float:
    """Edits a second with one always under way: what one at a time can do."""
    async with open_session() as session:
        jobs, done, started = trace(10_000, 1, 17), 0, time.monotonic()
        while time.monotonic() - started < seconds:
            await side.edit(session, jobs[done][1])
            done += 1
        return done / (time.monotonic() - started)


async def load(side: Side, per_s: float, seconds: float, overload: bool) -> dict[str, typing.Any]:
    """Arrivals for ``seconds``; at overload what is not done by then is given up and not counted."""
    async with open_session() as session:
        jobs = [one for one in trace(int(3 * per_s * seconds) + 10, per_s, 23) if one[0] < seconds]
        rows, cpu, started = await side.rows(session), side.cpu_s(), time.monotonic()
        done: list[tuple[int, float, float]] = []  # steps, seconds it took, second it ended
        refused = 0

        async def one(at: float, job: Job) -> None:
            nonlocal refused
            await asyncio.sleep(max(0, started + at - time.monotonic()))
            sent = time.monotonic()
            if await side.edit(session, job):
                done.append((job["num_inference_steps"], time.monotonic() - sent, time.monotonic() - started))
            else:
                refused += 1

        tasks = [asyncio.create_task(one(*arrival)) for arrival in jobs]
        await asyncio.wait(tasks, timeout=seconds if overload else None)
        ended, cpu_s = time.monotonic() - started, side.cpu_s() - cpu
        in_time = [one for one in done if one[2] <= ended]
        for task in tasks:
            task.cancel()
        failed = [r for r in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(r, Exception)]
        if failed:
            raise failed[0]
        ran = (await side.rows(session) if not overload or side.name == "ip2p" else 0) - rows
        return _summary(in_time, ended, refused, len(jobs), cpu_s, ran if ran > 0 else None)


def _summary(
    done: list[tuple[int, float, float]], ended: float, refused: int, sent: int, cpu_s: float, rows: int | None
) -> dict[str, typing.Any]:
    def percentile(values: list[float], share: float) -> float | None:
        return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None

    return {
        "sent": sent, "done": len(done), "refused": refused, "edits_per_s": len(done) / ended,
        "p50_s": percentile([took for _, took, _ in done], 0.5),
        "p95_s": percentile([took for _, took, _ in done], 0.95),
        "p95_s_of_10_steps": percentile([took for steps, took, _ in done if steps == 10], 0.95),
        "steps_done": sum(steps for steps, _, _ in done),
        "cpu_s_per_edit": cpu_s / max(1, len(done)), "rows": rows, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def measure(side: str, base: float | None, args: argparse.Namespace) -> dict[str, typing.Any]:
    """Capacity (of the first side), 0.7 times and 3 times it."""
    with served(side, args) as server:
        found: dict[str, typing.Any] = {}
        if base is None:
            base = found["capacity_per_s"] = asyncio.run(capacity(server, args.seconds / 2))
        found["load 0.7"] = asyncio.run(load(server, 0.7 * base, args.seconds, overload=False))
        found["load 3"] = asyncio.run(load(server, 3 * base, args.seconds, overload=True))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each load (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="of everything; medians are shown (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch in each server (default %(default)s)")
    parser.add_argument("--port", type=int, default=18750, help="first of four (default %(default)s)")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="the first one gives the capacity")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder (default %(default)s)")
    args = parser.parse_args()
    runs: list[dict[str, typing.Any]] = []
    for _ in range(args.repeats):
        found: dict[str, typing.Any] = {}
        base: float | None = None
        for side in args.sides:
            found[side] = measure(side, base, args)
            base = base or found[side]["capacity_per_s"]
            print(json.dumps({side: found[side]}), flush=True)
        runs.append(found)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "serving.json").write_text(json.dumps(runs, indent=1) + "\n")
    show(runs, args.sides)
    return 0


def show(runs: list[dict[str, typing.Any]], sides: typing.Sequence[str]) -> None:
    """A table of medians, and the ratios that are promised."""

    def median(side: str, load: str, name: str) -> float:
        return statistics.median([run[side][load][name] for run in runs])

    print(f"{'':14} {'edits/s at 3x':>14} {'p95 at 0.7x':>12} {'of 10 steps':>12} {'CPU s an edit':>14}")
    for side in sides:
        numbers = (
            median(side, "load 3", "edits_per_s"), median(side, "load 0.7", "p95_s"),
            median(side, "load 0.7", "p95_s_of_10_steps"), median(side, "load 3", "cpu_s_per_edit"),
        )  # fmt: skip
        print(f"{side:14} {numbers[0]:14.2f} {numbers[1]:12.2f} {numbers[2]:12.2f} {numbers[3]:14.2f}")
    if "ip2p" in sides and "one at a time" in sides:
        ratio = median("ip2p", "load 3", "edits_per_s") / median("one at a time", "load 3", "edits_per_s")
        best = min(median(side, "load 0.7", "p95_s_of_10_steps") for side in sides if side != "ip2p")
        print(f"at 3x: {ratio:.2f} times the edits/s of one at a time")
        print(f"at 0.7x: p95 of 10-step edits {median('ip2p', 'load 0.7', 'p95_s_of_10_steps') / best:.2f} of the best")


if __name__ == "__main__":
    sys.exit(main())
