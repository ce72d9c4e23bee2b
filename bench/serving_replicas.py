#!/usr/bin/env python3
"""Replicas and nodes that follow the load: a plot of both over time, on a local cluster whose autoscaler adds nodes.

    python bench/serving_replicas.py --output docs/figures

Quiet, then more edits than one replica can do, then quiet again. Replicas are asked for by seconds of queued work
(serve/app.py), nodes by the replicas that find no room. All raylets share this machine's cores, so what is shown is
that the pool follows the work, not that it gets faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp

from bench.serving import Job, Side, local_ray, open_session, script, trace, warm
from cluster.autoscaling import Nodes
from cluster.head import Size

ROOT = Path(__file__).resolve().parent.parent


def config(args: argparse.Namespace) -> dict[str, typing.Any]:
    arguments = {
        "min_replicas": 1, "max_replicas": args.replicas, "num_cpus": 1, "target_s": args.target, "queue_limit_s": 600,
        "upscale_delay_s": 2, "downscale_delay_s": 10,
    }  # fmt: skip
    return {
        "http_options": {"host": "127.0.0.1", "port": args.port},
        "proxy_location": "HeadOnly",
        "applications": [
            {"name": "bench", "route_prefix": "/", "import_path": "serve.app:app", "args": arguments},
        ],
    }


async def watched(side: Side, args: argparse.Namespace, environment: dict[str, str]) -> list[dict[str, float]]:
    """Replicas, nodes and edits under way, twice a second, while the load comes and goes."""
    started, seen = time.monotonic(), []
    under_way = 0
    async with open_session() as session:

        async def one(at: float, job: Job) -> None:
            nonlocal under_way
            await asyncio.sleep(max(0, started + args.quiet + at - time.monotonic()))
            under_way += 1
            try:
                await side.edit(session, job)
            finally:
                under_way -= 1

        jobs = [asyncio.create_task(one(*each)) for each in trace(int(args.rate * args.busy), args.rate, 43)]
        while time.monotonic() - started < args.quiet + args.busy + args.after:
            seen.append({
                "second": time.monotonic() - started, "under_way": under_way,
                **await counts(session, environment),
            })  # fmt: skip
            await asyncio.sleep(0.5)
        await asyncio.gather(*jobs)
    return seen


async def counts(session: aiohttp.ClientSession, environment: dict[str, str]) -> dict[str, float]:
    """What the dashboard says: running replicas, and nodes alive."""
    url, token = environment["RAY_DASHBOARD_ADDRESS"], Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    headers = {"authorization": f"Bearer {token}"}
    async with session.get(f"{url}/api/serve/applications/", headers=headers) as answer:
        deployments = (await answer.json())["applications"]["bench"]["deployments"]
        replicas = [one["state"] for each in deployments.values() for one in each["replicas"]]
    async with session.get(f"{url}/nodes?view=summary", headers=headers) as answer:
        nodes = [one["raylet"].get("state") for one in (await answer.json())["data"]["summary"]]
    return {"replicas": replicas.count("RUNNING"), "nodes": nodes.count("ALIVE")}


def draw(seen: list[dict[str, float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seconds = [one["second"] for one in seen]
    for name in ("replicas", "nodes"):
        axes.step(seconds, [one[name] for one in seen], where="post", label=name)
    axes.set_xlabel("seconds")
    axes.set_ylabel("replicas, nodes")
    axes.set_ylim(bottom=0)
    load = axes.twinx()
    load.fill_between(seconds, [one["under_way"] for one in seen], alpha=0.2, color="grey")
    load.set_ylabel("edits under way (grey)")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", type=float, default=10, help="seconds before the load (default %(default)s)")
    parser.add_argument("--busy", type=float, default=60, help="seconds of load (default %(default)s)")
    parser.add_argument("--after", type=float, default=110, help="seconds after the load (default %(default)s)")
    parser.add_argument("--rate", type=float, default=5, help="edits a second (default %(default)s)")
    parser.add_argument("--replicas", type=int, default=3, help="at most (default %(default)s)")
    parser.add_argument("--target", type=float, default=4, help="seconds of work a replica (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=18770, help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder (default %(default)s)")
    args = parser.parse_args()
    # The head has room for Ray Serve itself; every replica needs a node.
    size = Size(num_cpus=0, num_gpus=0, object_store_mb=200, nodes=Nodes(most=args.replicas, cpus=1))
    with local_ray(args, size) as (environment, cluster):
        (cluster.folder / "bench.yaml").write_text(json.dumps(config(args)))
        subprocess.run([script("serve"), "deploy", str(cluster.folder / "bench.yaml")], env=environment, check=True)
        side = warm(Side("ip2p", f"http://127.0.0.1:{args.port}", cluster.pid))
        seen = asyncio.run(watched(side, args, environment))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "serving_replicas.json").write_text(json.dumps(seen) + "\n")
    draw(seen, args.output / "serving_replicas.png")
    for name in ("replicas", "nodes"):
        counted = [one[name] for one in seen]
        print(f"{name}: {counted[0]:.0f} -> {max(counted):.0f} -> {counted[-1]:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
