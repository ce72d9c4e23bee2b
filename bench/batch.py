#!/usr/bin/env python3
"""What a batch costs beside its edits: against the engine alone, with an editor that only copies, and as a pool.

    python bench/batch.py engine --edits 200
    python bench/batch.py copy --lines 100000
    python bench/batch.py pool --output docs/figures

engine: the same edits by one engine on all cores in this process, with nothing else to do (pictures decoded before,
results thrown away), and by jobs/batch_edit.py with one single-threaded worker a core; edits a second while either
edits, without the start. copy: lines through everything but the model; memory of driver and workers over time, a
kill (-9) in the middle, and how long the next run takes to its first new edit. pool: workers and nodes over time on a
local cluster whose autoscaler adds nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from ip2p.images import encode_image
from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.renderer import render

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = ("make it night", "add a rainbow", "turn it into a castle", "make it a pencil sketch", "put it on snow")
ROWS = 24
PICTURES = 64


def write_manifest(folder: Path, lines: int) -> Path:
    """``lines`` edits of PICTURES postcards: 10, 20 or 50 steps as in bench/serving.py."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(min(PICTURES, lines)):
        (folder / f"{number}.png").write_bytes(encode_image(render(scene_of(91, number, None), 64)))
    path = folder / "edits.jsonl"
    with path.open("w") as file:
        for number in range(lines):
            row = {
                "id": str(number), "image": f"{number % PICTURES}.png", "instruction": draw.choice(INSTRUCTIONS),
                "steps": draw.choices((10, 20, 50), (0.3, 0.5, 0.2))[0], "seed": number,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path


def engine_alone(manifest: Path) -> dict[str, float]:
    """All edits of ``manifest`` by one engine with as many torch threads as there are cores."""
    import torch

    from ip2p.batch.editing import EngineEditing
    from ip2p.editing.edit_request import EditRequest
    from ip2p.pictures import read_picture

    torch.set_num_threads(os.cpu_count() or 1)
    editing = EngineEditing("embedded", "float32", "cpu", ROWS)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    requests = [
        EditRequest(
            image=read_picture(manifest.parent / row["image"]), instruction=row["instruction"], steps=row["steps"],
            seed=row["seed"], batch=True,
        )
        for row in rows
    ]  # fmt: skip
    started = time.monotonic()
    edits = [editing.engine.submit(request) for request in requests]
    for edit in edits:
        edit.future.result()
    seconds = time.monotonic() - started
    editing.close()
    return {"edits_per_s": len(edits) / seconds, "seconds": seconds, "row_evals": editing.row_evals}


def job(manifest: Path, output: Path, *more: str) -> list[str]:
    command = [sys.executable, str(ROOT / "jobs" / "batch_edit.py"), "--manifest", str(manifest), "--json"]
    return [*command, "--output", str(output), "--rows-per-call", str(ROWS), *more]


class Told:
    """What a job says on its standard error, with the time at which it was said."""

    def __init__(self, process: subprocess.Popen[str]):
        self.lines: list[tuple[float, dict[str, typing.Any]]] = []
        self.process = process
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.lines.append((time.monotonic(), json.loads(line)))

    def of(self, name: str) -> list[tuple[float, dict[str, typing.Any]]]:
        return [(at, said) for at, said in self.lines if name in said]


def started(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    surroundings = {**os.environ, "RAY_worker_niceness": "0", **(environment or {})}
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], told: Told) -> dict[str, typing.Any]:
    """The summary of a job, when it is through."""
    assert process.stdout is not None
    output = process.stdout.read()
    process.wait()
    told.thread.join()
    return dict(json.loads(output))


def run_engine(args: argparse.Namespace, folder: Path) -> dict[str, typing.Any]:
    manifest = write_manifest(folder / "in", args.edits)
    cores = os.cpu_count() or 1
    process = started(job(manifest, folder / "out", "--workers", str(cores), "--chunk", "16"))
    told = Told(process)
    summary = ended(process, told)
    ready = next(at for at, said in told.of("ready") if said["ready"] == cores)
    last = told.of("edits")[-1][0]
    done_before = sum(said["edits"] for at, said in told.of("edits")[:1] if at < ready)
    batch = {"edits_per_s": (summary["done"] - done_before) / (last - ready), "seconds": last - ready,
             "row_evals": summary["this_run"]["row_evals"]}  # fmt: skip
    alone = engine_alone(manifest)
    return {"engine alone": alone, "batch": batch, "ratio": batch["edits_per_s"] / alone["edits_per_s"]}


def memory_mib(process: psutil.Process) -> dict[str, float]:
    """Of the driver, and of all workers together, without what they share."""
    workers = []
    for child in process.children(recursive=True):
        try:
            if "EditChunks" in " ".join(child.cmdline()):
                workers.append(child.memory_full_info().uss)
        except psutil.Error:
            continue
    return {"driver": process.memory_full_info().uss / 2**20, "workers": sum(workers) / 2**20}


def run_copy(args: argparse.Namespace, folder: Path) -> dict[str, typing.Any]:
    manifest = write_manifest(folder / "in", args.lines)
    options = ("--copy", "--workers", "2", "--chunk", "256")
    first = started(job(manifest, folder / "out", *options))
    told, memory, begun = Told(first), [], time.monotonic()
    while first.poll() is None:
        time.sleep(1)
        edits = told.of("edits")
        if edits:
            memory.append((edits[-1][1]["edits"], memory_mib(psutil.Process(first.pid))))
            if edits[-1][1]["edits"] >= args.lines // 2:
                first.kill()
                first.wait()
    half = told.of("edits")
    rate = (half[-1][1]["edits"] - half[0][1]["edits"]) / (half[-1][0] - half[0][0])
    again_at = time.monotonic()
    again = started(job(manifest, folder / "out", *options))
    told_again = Told(again)
    summary = ended(again, told_again)
    early, late = memory[len(memory) // 5][1], memory[-1][1]
    return {
        "lines": args.lines, "edits_per_s": rate, "killed_at": half[-1][1]["edits"],
        "seconds_to_first_new_edit": told_again.of("edits")[0][0] - again_at, "done": summary["done"],
        "then_edited": summary["this_run"]["edited"], "then_found": summary["this_run"]["found"],
        "memory_mib_at_a_fifth": early, "memory_mib_at_the_kill": late,
        "seconds": time.monotonic() - begun,
    }  # fmt: skip


def run_pool(args: argparse.Namespace, folder: Path) -> dict[str, typing.Any]:
    from cluster.autoscaling import Nodes
    from cluster.head import Size, environment, start, stop

    manifest = write_manifest(folder / "in", args.edits)
    cluster = start(Size(num_cpus=0, num_gpus=0, object_store_mb=200, nodes=Nodes(most=args.workers, cpus=1)))
    try:
        surroundings = environment(cluster)
        begun = time.monotonic()
        process = started(job(manifest, folder / "out", "--workers", f"1:{args.workers}", "--chunk", "8"), surroundings)
        told, nodes = Told(process), []
        while process.poll() is None or time.monotonic() < told.lines[-1][0] + args.after:
            nodes.append((time.monotonic() - begun, _nodes(surroundings)))
            time.sleep(0.5)
        summary = ended(process, told)
    finally:
        stop(cluster)
    pool = [(at - begun, said["pool"], said["ready"]) for at, said in told.of("pool")]
    edits = [(at - begun, said["edits"]) for at, said in told.of("edits")]
    seen = {"nodes": nodes, "pool": pool, "edits": edits, "done": summary["done"]}
    args.output.mkdir(parents=True, exist_ok=True)
    draw_pool(seen, args.output / "batch_pool.png")
    counted = [count for _, count in nodes]
    return {"nodes": f"{counted[0]} -> {max(counted)} -> {counted[-1]}", "done": summary["done"],
            "workers": " -> ".join(str(ready) for *_, ready in pool)}  # fmt: skip


def _nodes(surroundings: dict[str, str]) -> int:
    import urllib.request

    token = Path(surroundings["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    url = f"{surroundings['RAY_DASHBOARD_ADDRESS']}/nodes?view=summary"
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        found = json.load(answer)["data"]["summary"]
    return sum(one["raylet"].get("state") == "ALIVE" for one in found)


def draw_pool(seen: dict[str, typing.Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.step(*zip(*seen["nodes"], strict=True), where="post", label="nodes")
    axes.step([at for at, *_ in seen["pool"]], [ready for *_, ready in seen["pool"]], where="post", label="workers")
    axes.set_xlabel("seconds")
    axes.set_ylabel("workers, nodes")
    axes.set_ylim(bottom=0)
    done = axes.twinx()
    done.fill_between(*zip(*seen["edits"], strict=True), alpha=0.2, color="grey")
    done.set_ylabel("edits done (grey)")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engine", "copy", "pool"))
    parser.add_argument("--edits", type=int, default=200, help="of engine and pool (default %(default)s)")
    parser.add_argument("--lines", type=int, default=100_000, help="of copy (default %(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="of pool, at most (default %(default)s)")
    parser.add_argument("--after", type=float, default=40, help="seconds to watch an idle pool (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ip2p-bench-", ignore_cleanup_errors=True) as folder:
        found = {"engine": run_engine, "copy": run_copy, "pool": run_pool}[args.what](args, Path(folder))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"batch_{args.what}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
