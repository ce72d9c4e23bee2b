"""``ip2p recolour``: the pairs of a run in other colours, as a run of their own. Flags and printing only."""

from __future__ import annotations

import argparse
import re

HELP = """Pairs of a run in other colours: red, green and blue change places in both pictures.

  ip2p recolour --input out/run --only '^replace' --output out/run-recoloured
  python jobs/train.py --pairs out/run out/run-recoloured --output out/edit

An edit that speaks of shapes is as right in other colours; such pairs are meant to teach an editor to take colours from
the picture that it is shown. Choose instructions that stay true (--only): neither "make it night" nor "add a rainbow".
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    parser.add_argument("--input", required=True, metavar="URI", help="finished run, local or s3://")
    parser.add_argument("--output", required=True, metavar="URI", help="empty folder for the new run")
    parser.add_argument("--only", required=True, metavar="REGEX", help="of instructions that stay true (any case)")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="orders of the channels a pair, 1..5 (1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Recolour and print the counts. Raises InputError for flags that cannot be used."""
    from tqdm import tqdm

    from ip2p.dataset.recolouring import ORDERS, recolour_run
    from ip2p.errors import InputError
    from ip2p.storage import open_folder

    if not 1 <= args.times <= len(ORDERS):
        raise InputError(f"--times is 1 to {len(ORDERS)}, got {args.times}")
    try:
        only = re.compile(args.only, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"--only {args.only!r} is no regular expression: {error}") from error
    with tqdm(unit="prompt", disable=True if args.quiet else None) as bar:
        report = recolour_run(open_folder(args.input), open_folder(args.output), only, args.times, bar.update)
    print(f"{args.output}: {report.prompts} prompts, {report.pairs} pairs")
    return 0
