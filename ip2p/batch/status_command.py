"""``ip2p batch-edit status``: how far a batch is, from the files beside its outputs. Flags and printing only."""

from __future__ import annotations

import argparse
import json
import time

HELP = """Say how far a batch of jobs/batch_edit.py is, and who works on it.

  ip2p batch-edit status s3://bucket/edited
  ip2p batch-edit status out/night --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("status",))
    parser.add_argument("uri", help="the --output of the batch")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the newest status. Raises InputError where there is no batch."""
    from ip2p.batch.lease import HELD_S
    from ip2p.batch.places import LEASE, STATUS, SUMMARY
    from ip2p.errors import InputError
    from ip2p.storage import open_folder

    folder = open_folder(args.uri)
    if not folder.exists(LEASE):
        raise InputError(f"{args.uri}: no batch was begun here; name the --output of jobs/batch_edit.py")
    lease = json.loads(folder.read(LEASE))
    status = json.loads(folder.read(STATUS)) if folder.exists(STATUS) else {}
    silent_s = round(time.time() - status["at"]) if status else None
    summary = json.loads(folder.read(SUMMARY)) if folder.exists(SUMMARY) else {}
    ended = "finished" if summary.get("submission") == lease["fence"] else "stopped"
    state = ended if lease["released"] else "running"
    if args.json:
        print(json.dumps({**status, "state": state, "host": lease["host"], "pid": lease["pid"], "silent_s": silent_s}))
        return 0
    print(f"{state}: process {lease['pid']} on {lease['host']}, submission {lease['fence']}")
    if status:
        print(
            f"{status['done']} of {status['lines']} done, {status['failed']} failed, {status['rejected']} rejected, "
            f"{status['waiting']} waiting, {status['workers']} workers; written {silent_s} s ago"
        )
        if state == "running" and silent_s is not None and silent_s > 3 * HELD_S:
            print("it may have died: run the same command again to go on")
        if status["eta_s"]:
            print(f"about {status['eta_s']} s left")
    return 0
