"""``ip2p repeat``: the edits of a run asked a second time, as a run of their own. Flags and printing only."""

from __future__ import annotations

import argparse

HELP = """Ask every edit of a run again of the picture that shows it already: the answer is the same picture.

  ip2p repeat --input out/run --output out/run-again
  python jobs/train.py --pairs out/run out/run-again --output out/edit

Such pairs are free of faults; an editor learns from them to leave alone what it was not asked to change.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    parser.add_argument("--input", required=True, metavar="URI", help="finished run, local or s3://")
    parser.add_argument("--output", required=True, metavar="URI", help="empty folder for the new run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Repeat and print the counts."""
    from tqdm import tqdm

    from ip2p.dataset.repetition import repeat_run
    from ip2p.storage import open_folder

    with tqdm(unit="prompt", disable=True if args.quiet else None) as bar:
        report = repeat_run(open_folder(args.input), open_folder(args.output), bar.update)
    print(f"{args.output}: {report.prompts} prompts, {report.pairs} pairs")
    return 0
