"""The command line: ``python -m ip2p COMMAND``. Each command lives beside what it runs and is imported when asked for.

Long work on a cluster is not here but in ``jobs/``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ip2p import __version__
from ip2p.errors import Ip2pError

COMMANDS = {
    "edit": ("ip2p.editing.command", "edit a picture by an instruction"),
    "postcard": ("ip2p.postcards.command", "draw postcards and their exact edits"),
    "export": ("ip2p.dataset.export_command", "write a run as the original's tree, Hugging Face columns or WebDataset"),
    "import": ("ip2p.dataset.import_command", "read the original's tree or Hugging Face columns as a run"),
    "invert": ("ip2p.dataset.invert_command", "turn the pairs of a run around: each add gives a remove"),
    "repeat": ("ip2p.dataset.repeat_command", "ask the edits of a run again: nothing is left to change"),
    "recolour": ("ip2p.dataset.recolour_command", "pairs of a run in other colours, for edits that speak of shapes"),
    "batch-edit": ("ip2p.batch.status_command", "say how far a batch of edits is"),
    "serve": ("serve.command", "serve edits over HTTP, with a page"),
    "doctor": ("ip2p.doctor.command", "look for what would go wrong, and say what to do about it"),
    "weights": ("ip2p.models.weights_command", "fetch, verify, mirror and convert weights"),
    "verify": ("ip2p.dataset.verify_command", "check every file, row and picture of a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. An Ip2pError is printed in one line and gives 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        return _overview(arguments)
    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser(
        prog=f"ip2p {command}", description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.configure(parser)
    try:
        return int(module.run(parser.parse_args(arguments[1:])))
    except Ip2pError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _overview(arguments: list[str]) -> int:
    """Help for no command or ``--help``, the version, or an error that lists the commands."""
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    lines = ["usage: ip2p COMMAND [options]      ip2p COMMAND --help", "", "commands:"]
    lines += [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    lines += [
        "",
        "jobs on a cluster: python jobs/datagen.py --help, also train.py, batch_edit.py, evaluate.py, pretrain.py",
    ]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("\n".join(lines))
        return 0
    print(f"error: unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
