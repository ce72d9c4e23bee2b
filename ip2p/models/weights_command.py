"""``ip2p weights``: fetch, verify, mirror and convert weights. Flags and printing only."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """Bring weights to this machine, whole and verified; put them where many machines find them; convert old files.

  ip2p weights fetch hf:OWNER/NAME /models/sd15          # also https://…, s3://bucket/prefix or a folder
  ip2p weights verify /models/sd15
  ip2p weights mirror /models/sd15 s3://bucket/models/sd15
  ip2p weights convert instruct-pix2pix.ckpt /models/ip2p --base /models/sd15      # and back: folder to .safetensors

A fetch that is interrupted goes on where it stopped when it is run again. HF_ENDPOINT, HF_TOKEN and AWS_* are honoured.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    actions = parser.add_subparsers(dest="action", required=True)
    fetch = actions.add_parser("fetch", help="bring weights to a folder")
    fetch.add_argument("source", help="hf:OWNER/NAME[@REVISION], https://…, s3://bucket/prefix or a folder")
    fetch.add_argument("target", type=Path, help="folder to make")
    fetch.add_argument("--quiet", action="store_true", help="no progress bar")
    verify = actions.add_parser("verify", help="compare every file with the manifest")
    verify.add_argument("folder", type=Path)
    mirror = actions.add_parser("mirror", help="copy a folder with a manifest to where many machines find it")
    mirror.add_argument("folder", type=Path)
    mirror.add_argument("target", help="s3://bucket/prefix or a folder")
    convert = actions.add_parser(
        "convert", help="an original .ckpt to a diffusers folder, or a folder back to one file"
    )
    convert.add_argument("source", type=Path, help=".ckpt or .safetensors in the original's layout, or a folder")
    convert.add_argument("target", type=Path, help="folder, or .safetensors file")
    convert.add_argument(
        "--base", default="", metavar="DIR", help="model that the .ckpt was trained from (its configs)"
    )


def run(args: argparse.Namespace) -> int:
    """Run one action. Raises an Ip2pError with the remedy where it cannot."""
    return {"fetch": _fetch, "verify": _verify, "mirror": _mirror, "convert": _convert}[args.action](args)


def _fetch(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ip2p.models.fetching import Told, fetch, total_bytes
    from ip2p.models.weight_sources import open_source

    source = open_source(args.source)
    # disable=None hides the bar where stderr is no terminal.
    with tqdm(total=0, unit="B", unit_scale=True, disable=True if args.quiet else None) as bar:

        def planned(files: object) -> None:
            bar.reset(total=total_bytes(files))  # type: ignore[arg-type]

        fetched = fetch(source, args.target, Told(bar.update), planned=planned)
    print(f"{args.target}: {'fetched and verified' if fetched else 'was there already, verified'}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ip2p.models.checkpoint import read_manifest, verify_manifest

    verify_manifest(args.folder, remedy="fetch it again: `ip2p weights fetch`")
    print(f"{args.folder}: {len(read_manifest(args.folder)['files'])} files, all whole")
    return 0


def _mirror(args: argparse.Namespace) -> int:
    from ip2p.models.fetching import mirror

    copied = mirror(args.folder, args.target)
    print(f"{args.target}: {copied} files copied; fetch it with `ip2p weights fetch {args.target} FOLDER`")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from ip2p.models.conversion import convert

    convert(args.source, args.target, args.base)
    print(f"{args.target}: converted from {args.source}")
    return 0
