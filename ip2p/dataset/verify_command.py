"""``ip2p verify``: checks a run folder against its manifest and itself."""

from __future__ import annotations

import argparse
import sys

HELP = """Check a run folder: every file whole, every count right, every picture readable, no pair twice.

  ip2p verify --run out/demo
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="URI", help="run folder, local or s3://bucket/prefix")


def run(args: argparse.Namespace) -> int:
    """0 where nothing is wrong; 1, with a line for each problem, where something is."""
    from ip2p.dataset.run_folder import verify
    from ip2p.storage import open_folder

    problems = verify(open_folder(args.run))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.run}: whole")
    return 1 if problems else 0
