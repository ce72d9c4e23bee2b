"""``ip2p export``: a finished run in somebody else's format. Flags and printing only."""

from __future__ import annotations

import argparse
import typing

from ip2p.errors import InputError
from ip2p.storage import Folder, open_folder

HELP = "write a finished run as the original's tree, a Hugging Face dataset or WebDataset tars"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    parser.add_argument("--run", required=True, metavar="URI", help="folder of a finished run, local or s3://")
    parser.add_argument("--output", required=True, metavar="URI", help="empty folder to write to, local or s3://")
    parser.add_argument("--format", required=True, choices=("original", "hf", "webdataset"))
    parser.add_argument("--pairs-per-prompt", choices=("one", "all"), help="hf only: the best pair, or all (default)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Export and print the counts. Raises an Ip2pError with the remedy where it cannot."""
    from tqdm import tqdm

    from ip2p.dataset.run_folder import count_pairs

    if args.pairs_per_prompt and args.format != "hf":
        raise InputError(f"--pairs-per-prompt belongs to --format hf; {args.format} always holds all pairs")
    source, output = open_folder(args.run), open_folder(args.output)
    # disable=None hides the bar where stderr is no terminal.
    with tqdm(total=count_pairs(source), unit="pair", disable=True if args.quiet else None) as bar:
        counts = _export(args, source, output, bar.update)
    print(f"{args.output}: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    return 0


def _export(
    args: argparse.Namespace, source: Folder, output: Folder, progress: typing.Callable[[int], object]
) -> dict[str, int]:
    if args.format == "original":
        from ip2p.dataset.export_original import export_original

        return export_original(source, output, progress)
    if args.format == "hf":
        from ip2p.dataset.export_huggingface import export_huggingface

        return export_huggingface(source, output, args.pairs_per_prompt or "all", progress)
    from ip2p.dataset.export_webdataset import export_webdataset

    return export_webdataset(source, output, progress)
