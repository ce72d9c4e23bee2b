"""``ip2p import``: a dataset in somebody else's format as a run folder. Flags and printing only."""

from __future__ import annotations

import argparse
import sys

from ip2p.storage import open_folder

HELP = "read the original's tree or a five-column Hugging Face dataset as a run folder"
SHOWN = 20  # problems printed; all of them are in the run's ledger


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    parser.add_argument("--input", required=True, metavar="URI", help="folder to read, local or s3://")
    parser.add_argument("--output", required=True, metavar="URI", help="empty folder for the run, local or s3://")
    parser.add_argument("--format", required=True, choices=("original", "hf"))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Import, print the counts, and name on stderr what was left out. Raises an Ip2pError where nothing came in."""
    from tqdm import tqdm

    from ip2p.dataset.import_huggingface import import_huggingface
    from ip2p.dataset.import_original import import_original

    read = {"original": import_original, "hf": import_huggingface}[args.format]
    # disable=None hides the bar where stderr is no terminal.
    with tqdm(unit="prompt", disable=True if args.quiet else None) as bar:
        report = read(open_folder(args.input), open_folder(args.output), bar.update)
    print(f"{args.output}: {report.prompts} prompts, {report.pairs} pairs, {len(report.problems)} problems")
    for problem in report.problems[:SHOWN]:
        print(f"  left out: {problem}", file=sys.stderr)
    if len(report.problems) > SHOWN:
        print(f"  and {len(report.problems) - SHOWN} more; the error column of the ledger has all", file=sys.stderr)
    return 0
