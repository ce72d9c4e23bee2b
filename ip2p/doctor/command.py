"""``ip2p doctor``: flags and printing only."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from ip2p.doctor.finding import ERROR, FINE, WARNING, Finding

HELP = """Look for what would go wrong later, and say what to do about it.

  ip2p doctor
  ip2p doctor --recipe sd15 --set models.text_to_image=/models/sd15 --s3 s3://bucket/run --output /data/out
  ip2p doctor --ckpt /models/edit --port 8000 --json

Exit code 0: nothing stands in the way (warnings may); 1: something does.
"""
SIGNS = {FINE: "ok", WARNING: "!!", ERROR: "NO"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    add = parser.add_argument
    add("--recipe", default="postcard", help="what will be made: postcard, sd15 (default %(default)s)")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="as for jobs/datagen.py; repeatable")
    add("--ckpt", default="embedded", metavar="DIR", help="edit model (default: the shipped one)")
    add("--output", type=Path, default=Path("out"), help="folder that will be written (default %(default)s)")
    add("--s3", metavar="URI", help="s3://bucket/prefix that will be read and written")
    add("--port", type=int, action="append", default=[], help="that a server will listen on; repeatable")
    add("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Print every finding as it is made; 1 where one is an error."""
    worst = 0
    for one in findings(args):
        worst = max(worst, int(one.level == ERROR))
        print(json.dumps(dataclasses.asdict(one)) if args.json else shown(one), flush=True)
    return worst


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """The quick ones first."""
    from ip2p.doctor.accelerator import check_driver, check_gpu_memory, check_torch
    from ip2p.doctor.machine import check_disk, check_port, check_python, check_shared_memory
    from ip2p.doctor.ray_setup import check_auth, check_cluster, check_ray
    from ip2p.doctor.store import check_store
    from ip2p.doctor.weights import check_edit_weights, check_recipe_weights

    yield check_python()
    yield check_disk(args.output)
    yield check_shared_memory()
    for port in args.port:
        yield check_port(port)
    yield check_ray()
    yield check_auth()
    yield check_cluster()
    if args.s3:
        yield check_store(args.s3)
    torch = check_torch()
    yield torch
    if torch.level == FINE:
        yield check_driver()
        yield check_gpu_memory(args.recipe)
        yield check_edit_weights(args.ckpt)
        yield check_recipe_weights(args.recipe, tuple(args.set))


def shown(one: Finding) -> str:
    remedy = f"\n     -> {one.remedy}" if one.remedy else ""
    return f"{SIGNS[one.level]}   {one.name}: {one.found}{remedy}"
