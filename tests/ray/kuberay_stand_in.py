"""What Ray's KubeRay autoscaler needs of Kubernetes: an HTTPS API with one RayCluster and its pods, and an operator.

A pod is a ``ray start`` on this machine with the pod's name and group. The operator knows replicas, the bounds of a
group and workersToDelete; nothing else of KubeRay is here.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import typing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster import processes

Object = dict[str, typing.Any]
RAY = Path(sys.executable).parent / "ray"


def free_ports(count: int) -> list[int]:
    """Ports that nobody had when this was asked."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]  # all at once: no number comes twice
        for each in held:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in held]


class KubernetesStandIn:
    """The API server and the operator, in threads of this process.

    ``start_pod(name, group)`` starts what a worker's pod is; the head is the caller's.
    """

    def __init__(self, cluster: Object, folder: Path, start_pod: typing.Callable[[str, str], subprocess.Popen]):
        self.cluster, self.folder, self.start_pod = cluster, folder, start_pod
        self.name, self.namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        self.pods: dict[str, Object] = {}
        self.running: dict[str, subprocess.Popen] = {}
        self.most: dict[str, int] = {}  # pods that a group ever had at a time
        self.patches: list[list[Object]] = []
        self.problems: list[str] = []
        self.restarts = 0
        self.lock = threading.RLock()
        self._made = 0
        self._stop = threading.Event()
        for group in cluster["spec"]["workerGroupSpecs"]:
            group.setdefault("scaleStrategy", {})  # as the operator's first update writes it
        self._certificate()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._server.serve_forever, self._run)]

    def start(self, head: str) -> None:
        """Serve, with the head's pod already there."""
        self.pods[head] = self._pod(head, "head", "headgroup")
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, and with them the making of pods; running ones are the caller's."""
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(30)

    def environment(self) -> dict[str, str]:
        """By which the autoscaler finds the API, is let in and knows its pod, as the operator sets it."""
        certificate, key = str(self.folder / "certificate.pem"), str(self.folder / "key.pem")
        return {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT_HTTPS": str(self._server.server_address[1]),
            "RAY_KUBERAY_CA_CERT_PATH": certificate,
            "RAY_KUBERAY_CLIENT_CERT_PATH": certificate,
            "RAY_KUBERAY_CLIENT_KEY_PATH": key,
            "KUBERAY_CRD_VER": "v1",
            "RAY_HEAD_POD_NAME": next(iter(self.pods)),
        }

    def group(self, name: str) -> Object:
        (found,) = [each for each in self.cluster["spec"]["workerGroupSpecs"] if each["groupName"] == name]
        return found

    def workers(self, group: str) -> list[str]:
        with self.lock:
            return [name for name, pod in self.pods.items() if pod["metadata"]["labels"]["ray.io/group"] == group]

    def patch(self, operations: list[Object]) -> None:
        """JSON patch (RFC 6902) of the RayCluster; a path that is not there is an error, as in the real server."""
        with self.lock:
            for operation in operations:
                *steps, last = operation["path"].strip("/").split("/")
                place: typing.Any = self.cluster
                for step in steps:
                    place = place[int(step)] if isinstance(place, list) else place[step]
                if operation["op"] != "replace" or last not in place:
                    raise KeyError(f"cannot {operation['op']} {operation['path']}")
                place[last] = operation["value"]
            self.patches.append(operations)

    def answer(self, method: str, address: str, body: bytes) -> tuple[int, Object]:
        """What the API server says."""
        path = urlsplit(address).path
        cluster = f"/apis/ray.io/v1/namespaces/{self.namespace}/rayclusters/{self.name}"
        with self.lock:
            if path == cluster and method == "PATCH":
                self.patch(json.loads(body))
            if path == cluster:
                return 200, self.cluster
            if path == f"/api/v1/namespaces/{self.namespace}/pods" and method == "GET":
                return 200, {"metadata": {"resourceVersion": str(self._made)}, "items": list(self.pods.values())}
            pod = self.pods.get(path.removeprefix(f"/api/v1/namespaces/{self.namespace}/pods/"))
            if pod and method == "GET":
                return 200, pod
        self.problems.append(f"{method} {address}: nobody here answers that")
        return 404, {"kind": "Status", "code": 404}

    def _run(self) -> None:
        while not self._stop.wait(0.3):
            with self.lock:
                for group in self.cluster["spec"]["workerGroupSpecs"]:
                    self._reconcile(group)

    def _reconcile(self, group: Object) -> None:
        name = group["groupName"]
        for pod in group["scaleStrategy"].get("workersToDelete") or []:
            if self.pods.pop(pod, None):
                self.running.pop(pod).terminate()
        for pod in self.workers(name):
            if self.running[pod].poll() is not None:  # Ray gives a node 30 s to start, which busy cores may need
                self.restarts += 1
                self.running[pod] = self.start_pod(pod, name)
        wanted = min(group["maxReplicas"], max(group["minReplicas"], group["replicas"]))
        for _ in range(wanted - len(self.workers(name))):
            self._made += 1
            pod = f"{self.name}-{name}-worker-{self._made}"
            self.running[pod] = self.start_pod(pod, name)
            self.pods[pod] = self._pod(pod, "worker", name)
        self.most[name] = max(self.most.get(name, 0), len(self.workers(name)))

    def _pod(self, name: str, node_type: str, group: str) -> Object:
        labels = {"ray.io/cluster": self.name, "ray.io/node-type": node_type, "ray.io/group": group}
        return {
            "metadata": {"name": name, "labels": labels, "resourceVersion": str(self._made)},
            "spec": {},
            "status": {"podIP": "127.0.0.1", "containerStatuses": [{"state": {"running": {}}}]},
        }

    def _certificate(self) -> None:
        """One that signs itself, for an hour, by which each side knows the other."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
        now = datetime.datetime.now(datetime.UTC)
        loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(loopback, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (self.folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (self.folder / "key.pem").write_bytes(key.private_bytes(*plain))


def _handler(kubernetes: KubernetesStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                status, found = kubernetes.answer(self.command, self.path, body)
            except KeyError as error:
                kubernetes.problems.append(str(error))
                status, found = 422, {"kind": "Status", "code": 422, "message": str(error)}
            answer = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PATCH = _reply

    return Handler


class RayNodes:
    """Ray processes of one cluster in ``folder``, on ports of their own, with the token that KubeRay would make."""

    def __init__(self, folder: Path, ip: str):
        self.folder, self.ip = folder, ip
        self.gcs_port, self.client_port, self.dashboard_port = free_ports(3)
        self.token = secrets.token_hex(32)
        self._processes: dict[str, subprocess.Popen] = {}

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.gcs_port}"

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.pathsep.join(
                [str(RAY.parent), os.environ.get("PATH", os.defpath)]
            ),  # the autoscaler calls `ray`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            processes.MARK: str(self.folder),
        }

    def head(self, pod: str, inherited: dict[str, str]) -> subprocess.Popen:
        """The head, without a monitor of its own: KubeRay starts the autoscaler beside it."""
        options = [
            *("--head", "--no-monitor", f"--port={self.gcs_port}", f"--ray-client-server-port={self.client_port}"),
            *("--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"),
            f"--dashboard-port={self.dashboard_port}",  # its job API runs all the same
        ]
        return self._start(pod, "headgroup", options, inherited | {"RAY_enable_autoscaler_v2": "1"})

    def worker(self, pod: str, group: str, gpus: int, inherited: dict[str, str]) -> subprocess.Popen:
        """One CPU whatever the group says: a raylet starts a process for each before anybody asks."""
        return self._start(pod, group, [f"--address={self.address}", "--num-cpus=1", f"--num-gpus={gpus}"], inherited)

    def autoscaler(self, cluster: Object, environment: dict[str, str]) -> subprocess.Popen:
        """As the operator starts it: ``ray kuberay-autoscaler``."""
        metadata = cluster["metadata"]
        command = [
            *(str(RAY), "kuberay-autoscaler", f"--cluster-name={metadata['name']}"),
            *(f"--cluster-namespace={metadata['namespace']}", f"--gcs-address={self.address}"),
        ]
        mine = {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        return self.spawn("autoscaler", command, environment | mine)

    def spawn(
        self, name: str, command: list[str], environment: dict[str, str], **options: typing.Any
    ) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                stdout=options.pop("stdout", log),
                stderr=log,
                env=environment | self.environment(),
                start_new_session=True,
                **options,
            )
        return self._processes[name]

    def ended(self, *names: str) -> list[str]:
        """Those of ``names`` that were started and run no more."""
        return [name for name in names if name in self._processes and self._processes[name].poll() is not None]

    def clear(self, pod: str) -> None:
        """Remove what a node that did not start has left."""
        shutil.rmtree(self.folder / pod[-6:], ignore_errors=True)

    def end(self) -> None:
        """Every process of this cluster and none else; `ray stop` would end those of others."""
        left = processes.end(processes.strays(self.folder), grace_s=10)
        left |= processes.end(processes.strays(self.folder), grace_s=3)  # what the first ones left behind
        assert not left, left

    def _start(self, pod: str, group: str, options: list[str], inherited: dict[str, str]) -> subprocess.Popen:
        # Numbers, not 0: for ports that its agents would choose a raylet waits, and busy cores let it wait too long.
        listen, grpc, environments, metrics = free_ports(4)
        own = [
            # A folder each, as pods have; short, as sockets lie in it.
            *("--block", f"--temp-dir={self.folder}/{pod[-6:]}", f"--node-ip-address={self.ip}"),
            *(f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--runtime-env-agent-port={environments}", f"--metrics-export-port={metrics}"),
            *("--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"),
            "--include-log-monitor=false",
        ]
        names = {"RAY_CLOUD_INSTANCE_ID": pod, "RAY_NODE_TYPE_NAME": group}
        return self.spawn(pod, [str(RAY), "start", *options, *own], inherited | names)

    def has_joined(self, pod: str) -> bool:
        """Whether that pod's node has registered; Ray writes this file then."""
        return (self.folder / pod[-6:] / "ray_current_cluster").exists()

    def logs(self) -> str:
        """The end of each log, for a failure's message."""
        found = []
        for path in sorted(self.folder.glob("*.log")):
            with contextlib.suppress(OSError):
                found += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(found)
