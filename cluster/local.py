"""``python -m cluster.local up | down | status | run -- COMMAND``: a private Ray for this machine's work.

``run`` is what `make demo` uses: the cluster lives as long as the command. ``up`` leaves one running, ``down`` ends the
processes of that one and nothing else on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.autoscaling import Nodes
from cluster.commands import run_command, signals_held, signals_unwind
from cluster.head import Cluster, Size, clusters, environment, start, stop
from ip2p.errors import InputError, Ip2pError


def run(command: Sequence[str], size: Size) -> int:
    """Start a cluster, run ``command`` against it, end the cluster whatever happens; the exit code of ``command``.

    A command that a signal ended gives 128 + signal, as in a shell. When this process is interrupted or asked to end,
    the command has 10 s to leave before the cluster goes.
    """
    with signals_unwind():
        cluster = start(size)
        try:
            return run_command(command, environment(cluster))
        finally:
            with signals_held():
                stop(cluster)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    try:
        return _act(options, words[cut + 1 :])
    except Ip2pError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _act(options: argparse.Namespace, command: list[str]) -> int:
    if options.action == "run":
        if not command:
            raise InputError("run: no command; write: python -m cluster.local run -- COMMAND")
        return run(command, _size(options))
    if options.action == "up":
        with signals_unwind():
            print(_introduction(start(_size(options))))
    elif options.action == "down":
        for cluster in _named(options.folder, options.all):
            stop(cluster)
            print(f"ended {cluster.folder}")
    else:
        print(_table(clusters()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description="A private Ray on this machine.")
    actions = parser.add_subparsers(dest="action", required=True)
    size = Size()
    for name, words in (("up", "start a head and leave it running"), ("run", "start, run what follows --, end")):
        action = actions.add_parser(name, help=words, description=words)
        action.add_argument("--num-cpus", type=int, default=size.num_cpus, help="CPU slots (default: %(default)s)")
        action.add_argument("--num-gpus", type=int, help="GPUs (default: those that Ray finds)")
        action.add_argument("--object-store-mb", type=int, default=size.object_store_mb, help="default: %(default)s")
        action.add_argument(
            "--nodes", type=int, default=0, metavar="N",
            help="let Ray's autoscaler start up to N worker nodes here as work asks for them (default: 0)",
        )  # fmt: skip
        action.add_argument("--node-cpus", type=int, default=1, help="CPU slots of each (default: %(default)s)")
        action.add_argument("--node-gpus", type=int, default=0, help="GPU slots of each (default: %(default)s)")
        action.add_argument("--node-idle-s", type=float, default=10.0, help="then a node ends (default: %(default)s)")
    down = actions.add_parser("down", help="end a head that up started")
    down.add_argument("folder", nargs="?", type=Path, help="its folder; may be left out when there is one")
    down.add_argument("--all", action="store_true", help="end every one of this user")
    actions.add_parser("status", help="list the heads of this user")
    return parser


def _size(options: argparse.Namespace) -> Size:
    nodes = Nodes(options.nodes, options.node_cpus, options.node_gpus, idle_s=options.node_idle_s)
    return Size(options.num_cpus, options.num_gpus, options.object_store_mb, nodes)


def _named(folder: Path | None, every: bool) -> list[Cluster]:
    found = clusters()
    if every:
        return found
    chosen = [cluster for cluster in found if folder is None or cluster.folder == folder.absolute()]
    if not chosen:
        raise InputError(f"{folder or 'a local cluster'} is not up; see: python -m cluster.local status")
    if len(chosen) > 1:
        raise InputError(f"{len(chosen)} local clusters; name one: {', '.join(str(c.folder) for c in chosen)}")
    return chosen


def _introduction(cluster: Cluster) -> str:
    return f"""Ray is up in {cluster.folder} (pid {cluster.pid}), dashboard {cluster.dashboard}
to use it from this shell:  source {cluster.folder / "env.sh"}
to end it:                  python -m cluster.local down {cluster.folder}"""


def _table(found: list[Cluster]) -> str:
    if not found:
        return "no local cluster"
    lines = [f"{'folder':<20} {'pid':>8}  {'state':<6} dashboard"]
    for cluster in found:
        state = "up" if cluster.alive else "dead"
        lines.append(f"{cluster.folder!s:<20} {cluster.pid:>8}  {state:<6} {cluster.dashboard}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
