"""``ip2p invert``: the pairs of a run turned around, as a run of their own. Flags and printing only."""

from __future__ import annotations

import argparse
import sys

HELP = """Turn the pairs of a run around, so that each "add" gives a "remove" as well.

  ip2p invert --input out/run --triplets triplets.jsonl --output out/run-back
  python jobs/train.py --pairs out/run out/run-back --output out/edit

The triplets file names the way back: rows whose caption is a pair's edited caption, and the other way round
(`ip2p postcard --triplets` writes both ways).
"""
SHOWN = 5  # problems printed; all of them are in the run's ledger


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    parser.add_argument("--input", required=True, metavar="URI", help="finished run, local or s3://")
    parser.add_argument("--triplets", required=True, metavar="FILE", help=".jsonl, .csv or .parquet, local or s3://")
    parser.add_argument("--output", required=True, metavar="URI", help="empty folder for the new run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Invert, print the counts, and name on stderr what was left out. Raises an Ip2pError where nothing came of it."""
    from tqdm import tqdm

    from ip2p.dataset.inversion import invert_run
    from ip2p.storage import open_folder
    from ip2p.triplets.captions import read_triplets

    triplets = read_triplets(args.triplets).rows
    with tqdm(unit="prompt", disable=True if args.quiet else None) as bar:
        report = invert_run(open_folder(args.input), triplets, open_folder(args.output), bar.update)
    print(f"{args.output}: {report.prompts} prompts, {report.pairs} pairs, {len(report.problems)} left out")
    for problem in report.problems[:SHOWN]:
        print(f"  left out: {problem}", file=sys.stderr)
    return 0
