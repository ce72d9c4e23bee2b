"""One Ray head on this machine, private to its user: start, find, use and end it.

Each has its own ``/tmp/ip2p-XXXXXXXX`` (state, token, logs, Ray's session) and free ports, asks for a token and keeps
its dashboard on loopback, so several stand side by side and next to any other Ray. The command line is ``local``;
clusters of several machines are not made here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

from cluster import autoscaling, processes
from cluster.autoscaling import Nodes
from ip2p.errors import Ip2pError

# Ray's sockets lie some 70 bytes below and a Unix socket path ends at 107, so $TMPDIR, long on macOS, is not used.
PARENT = Path("/tmp")
PREFIX = "ip2p-"
AUTOSCALING = "autoscaling.yaml"
# Of another cluster. RAY_AUTH_TOKEN would even go before the file that we name.
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)


class ClusterError(Ip2pError):
    """The local Ray head did not start or did not end; the message carries the end of its log."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What the head offers. With fewer than 4 CPU slots, which need no cores, a pipeline of stages waits for itself."""

    num_cpus: int = max(4, os.cpu_count() or 1)
    num_gpus: int | None = None  # None: those that Ray finds
    object_store_mb: int = 1000
    nodes: Nodes = dataclasses.field(default_factory=Nodes)  # that come and go with the work


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A head that was started here. ``started`` (seconds since 1970) tells its process from a later one of that pid."""

    folder: Path
    pid: int
    started: float
    gcs_port: int
    dashboard_port: int

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def alive(self) -> bool:
        return processes.find_process(self.pid, self.started) is not None


def start(size: Size = Size()) -> Cluster:
    """Start a head in the current folder and wait until it takes jobs (about 10 s, more on a busy machine).

    Jobs that bring no working directory run in the current folder. Raises ClusterError, with the end of the head's log,
    when it fails twice; then, and when interrupted, nothing is left.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=PARENT))  # mode 0700
    try:
        _write_token(folder)
        try:
            return _start_once(folder, size)
        except ClusterError:  # between choosing a port and Ray's taking it, somebody else may have come
            return _start_once(folder, size)
    except BaseException:
        _remove(folder)
        raise


def stop(cluster: Cluster, grace_s: float = 15.0) -> None:
    """End the processes of ``cluster``, politely for ``grace_s`` seconds, then by force, and remove its folder."""
    _end_processes(cluster, grace_s)
    _remove(cluster.folder)


def clusters() -> list[Cluster]:
    """Every cluster of this user on this machine, also one whose head has died, oldest first."""
    found = []
    for path in PARENT.glob(f"{PREFIX}*/state.json"):
        # Gone meanwhile, another user's, or written by another version of this file.
        with contextlib.suppress(FileNotFoundError, PermissionError, ValueError, TypeError):
            if path.stat().st_uid == os.getuid() == path.parent.stat().st_uid:
                found.append(Cluster(**{**json.loads(path.read_text()), "folder": path.parent}))
    return sorted(found, key=lambda cluster: cluster.started)


def environment(cluster: Cluster) -> dict[str, str]:
    """This process's environment, made into that of a client of ``cluster`` with the ``ray`` of this Python on PATH."""
    return _inherited() | _addresses(cluster) | _shared_environment(cluster.folder)


def _addresses(cluster: Cluster) -> dict[str, str]:
    return {
        "RAY_ADDRESS": f"127.0.0.1:{cluster.gcs_port}",
        "RAY_API_SERVER_ADDRESS": cluster.dashboard,  # for `ray job`
        "RAY_DASHBOARD_ADDRESS": cluster.dashboard,  # for `serve`
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"])),
    }


def _start_once(folder: Path, size: Size) -> Cluster:
    shutil.rmtree(folder / "ray", ignore_errors=True)  # of a first try
    gcs, dashboard, client = _free_ports(3)
    if size.nodes.most:
        _write_autoscaling(folder, size, gcs)
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            _head_command(folder, size, gcs, dashboard, client),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_head_environment(folder, size),
            start_new_session=True,  # a Ctrl-C in the terminal is for the command, not for Ray
        )
    cluster = Cluster(folder, head.pid, psutil.Process(head.pid).create_time(), gcs, dashboard)
    try:
        _write_state(cluster)
        _wait_until_ready(cluster, head)
    except BaseException:
        _end_processes(cluster, grace_s=5)
        raise
    return cluster


def _head_command(folder: Path, size: Size, gcs: int, dashboard: int, client: int) -> list[str]:
    return [
        *(f"{_python_folder()}/ray", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--temp-dir={folder / 'ray'}", f"--port={gcs}", f"--ray-client-server-port={client}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        # 0 lets the system choose; the defaults are fixed numbers, on which two clusters would meet.
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--runtime-env-agent-port=0"),
        *("--metrics-export-port=0", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--num-cpus={size.num_cpus}", f"--object-store-memory={size.object_store_mb * 2**20}"),
        *([] if size.num_gpus is None else [f"--num-gpus={size.num_gpus}"]),
        *([f"--autoscaling-config={folder / AUTOSCALING}"] if size.nodes.most else []),
    ]


def _write_autoscaling(folder: Path, size: Size, gcs: int) -> None:
    from ray.util import get_node_ip_address

    asked = autoscaling.configuration(size.nodes, f"{get_node_ip_address()}:{gcs}", size.num_cpus)
    (folder / AUTOSCALING).write_text(json.dumps(asked, indent=1))  # JSON is YAML too


def _head_environment(folder: Path, size: Size) -> dict[str, str]:
    # There is no other node to drain to, and the default waits 30 s for running work.
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    scaling = autoscaling.environment() if size.nodes.most else {}
    return _inherited() | _shared_environment(folder) | drain | scaling | {processes.MARK: str(folder)}


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


def _shared_environment(folder: Path) -> dict[str, str]:
    return {
        # Job entrypoints inherit the head's PATH: without this folder first, their "python" has no ray.
        "PATH": os.pathsep.join([_python_folder(), os.environ.get("PATH", os.defpath)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray Serve kills an ingress that needs more than three times this to start, as it does on busy cores (5 s).
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    }


def _python_folder() -> str:
    return str(Path(sys.executable).parent)


def _write_token(folder: Path) -> None:
    handle = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


def _write_state(cluster: Cluster) -> None:
    (cluster.folder / "env.sh").write_text(_exports(cluster))
    partial = cluster.folder / "state.partial"
    partial.write_text(json.dumps(dataclasses.asdict(cluster), default=str, indent=1) + "\n")
    partial.rename(cluster.folder / "state.json")


def _exports(cluster: Cluster) -> str:
    values = {name: shlex.quote(v) for name, v in (_addresses(cluster) | _shared_environment(cluster.folder)).items()}
    # Put before whatever the reading shell has, which need not be what this process has.
    values["PATH"] = f'{shlex.quote(_python_folder())}:"$PATH"'
    return f"unset {' '.join(FOREIGN)}\n" + "".join(f"export {name}={value}\n" for name, value in values.items())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]  # all at once: no number comes twice
        for each in held:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in held]


def _wait_until_ready(cluster: Cluster, head: subprocess.Popen[bytes], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not _takes_jobs(cluster):
        if head.poll() is not None:
            raise ClusterError(f"ray start ended with {head.returncode}:\n{_log_end(cluster.folder)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"Ray took no jobs within {timeout_s:.0f} s:\n{_log_end(cluster.folder)}")
        time.sleep(0.25)


def _takes_jobs(cluster: Cluster) -> bool:
    # Written when the raylet has registered, some seconds after the job API first answers.
    if not (cluster.folder / "ray" / "ray_current_cluster").exists():
        return False
    token = (cluster.folder / "token").read_text()
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5):
            return True
    except OSError:  # nobody listens yet, or a status other than 200
        return False


def _log_end(folder: Path) -> str:
    return "\n".join((folder / "head.log").read_text(errors="replace").splitlines()[-15:])


def _end_processes(cluster: Cluster, grace_s: float) -> None:
    head = processes.find_process(cluster.pid, cluster.started)
    # Taken before the head ends: a renamed worker without parents would be harder to tell.
    members = processes.family(head) if head else set()
    if head:
        processes.end({head}, grace_s)  # which ends its own, in order
    left = processes.end({p for p in members | processes.strays(cluster.folder) if processes.is_alive(p)}, grace_s=3)
    if left:
        raise ClusterError(f"{cluster.folder}: processes {sorted(p.pid for p in left)} do not end; end them by hand")


def _remove(folder: Path) -> None:
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)  # a file that a dying process wrote last
    raise ClusterError(f"{folder} cannot be removed; look who writes there, then remove it by hand")
