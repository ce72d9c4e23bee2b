"""Real servers for tests, and what tests say to them: pictures as files, edits over HTTP, events, errors, metrics."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import requests
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from ip2p.editing.edit_bank import EditBank
from ip2p.editing.engine import EditEngine
from ip2p.editing.step_cost import StepCost
from ip2p.images import decode_image
from serve.engines import Engines
from serve.http import create_app
from serve.settings import Settings
from tests.pictures import file_of, pixels

ROOT = Path(__file__).resolve().parents[2]
EDITS = "/v1/images/edits"
PATIENCE_S = 30.0
ASKED = {"prompt": "make it night", "num_inference_steps": 3, "seed": 1}


def until(holds: Callable[[], typing.Any], what: str = "", seconds: float = PATIENCE_S) -> typing.Any:
    """What ``holds`` gives once that is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


# ---- pictures


PICTURE = file_of(pixels())


def far_apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# ---- answers


def files_in(answer: requests.Response) -> list[bytes]:
    """The pictures of an answer, as files."""
    assert answer.status_code == 200, answer.text[:500]
    return [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]


def picture_in(answer: requests.Response) -> np.ndarray:
    """The only picture of an answer."""
    (file,) = files_in(answer)
    return decode_image(file)


def error_in(answer: requests.Response, status: int | None = None) -> dict[str, typing.Any]:
    """The error of an answer, whose shape is checked."""
    body = answer.json()
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
    assert error["param"] is None or isinstance(error["param"], str)
    assert not re.search(r"Traceback|File \"|\.py\b", answer.text)
    assert status is None or answer.status_code == status, answer.text
    return typing.cast(dict[str, typing.Any], error)


def events_in(answer: requests.Response) -> list[tuple[str | None, str, dict[str, typing.Any]]]:
    """Id, name and data of the events of a stream, read to its end."""
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        said = {name: value for name, _, value in lines}
        if said:
            events.append((said.get("id"), said["event"], json.loads(said["data"])))
    return events


# ---- servers


@dataclasses.dataclass
class Address:
    """A server that runs, and the key that opens it."""

    url: str
    key: str | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, **more: typing.Any):
        return requests.request(
            method, self.url + path, headers={**self.headers, **(headers or {})}, timeout=PATIENCE_S, **more
        )

    def get(self, path: str, headers: dict[str, str] | None = None, **more: typing.Any) -> requests.Response:
        return self.ask("GET", path, headers, **more)

    def edit(
        self, image: bytes = PICTURE, headers: dict[str, str] | None = None, mask: bytes | None = None,
        read: bool = True, **fields: typing.Any,
    ) -> requests.Response:  # fmt: skip
        """One edit as a form; a field of None is left out. ``read``: to the end of the answer, else only its head."""
        texts = {name: _text(value) for name, value in {**ASKED, **fields}.items() if value is not None}
        files = {name: ("a file", data) for name, data in (("image", image), ("mask", mask)) if data is not None}
        return self.ask("POST", EDITS, headers, data=texts, files=files, stream=not read)

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every number of /metrics, by name and labels."""
        answer = self.get("/metrics")
        assert answer.status_code == 200
        return {
            (one.name, frozenset(one.labels.items())): one.value
            for family in text_string_to_metric_families(answer.text)
            for one in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values over all labels that are not named."""
        return sum(
            value for (known, its), value in self.metrics().items() if known == name and set(labels.items()) <= set(its)
        )

    def connected(self, path: str, headers: dict[str, str], body: bytes, method: str = "POST") -> socket.socket:
        """A bare connection that has sent a request, ``body`` being all or the beginning of what follows its head."""
        lines = [f"{method} {path} HTTP/1.1", "host: tests"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **headers}.items()]
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return connection


def _text(value: typing.Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def form_body(*parts: tuple[str, bytes | str], boundary: str = "b") -> bytes:
    """A multipart form byte by byte: bytes are files."""
    written = b""
    for name, value in parts:
        file, data = ("", value.encode()) if isinstance(value, str) else ('; filename="f"', value)
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'
        written += head.encode() + data + b"\r\n"
    return written + f"--{boundary}--\r\n".encode()


def head_of(body: bytes, kind: str = "multipart/form-data; boundary=b", **more: str) -> dict[str, str]:
    return {"content-type": kind, "content-length": str(len(body)), "connection": "close", **more}


def answer_on(connection: socket.socket) -> tuple[int, bytes]:
    """Status and the rest of the answer, read until the server closes."""
    said = b""
    while part := connection.recv(65536):
        said += part
    connection.close()
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@dataclasses.dataclass
class Service(Address):
    """A server in a thread of this process."""

    engines: Engines = dataclasses.field(kw_only=True)
    server: uvicorn.Server = dataclasses.field(kw_only=True)
    thread: threading.Thread = dataclasses.field(kw_only=True)

    def engine(self, name: str = "tiny") -> EditEngine:
        (found,) = [served.engine for served in self.engines.loaded() if served.name == name]
        return found

    @property
    def idle(self) -> bool:
        return not any(served.engine._edits for served in self.engines.loaded())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(folder: Path, key: str | None = None, ready: bool = True, **settings: typing.Any) -> Iterator[Service]:
    """A server of the tiny model in ``folder``; ``ready``: once it is."""
    chosen = Settings(**{"models": {"tiny": str(folder)}, "device": "cpu", "max_edit_pixels": 64 * 64, **settings})
    engines = Engines(chosen)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(chosen, engines), log_config=None, access_log=False, timeout_keep_alive=30, server_header=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        service = Service(url, key, engines=engines, server=server, thread=thread)
        thread.start()
        try:
            until(lambda: server.started, "a server")
            until(lambda: service.get("/readyz").status_code == 200 or not ready, "a server that is ready")
            RUNNING.append(service)
            yield service
        finally:
            service.stop()
            with contextlib.suppress(ValueError):
                RUNNING.remove(service)


RUNNING: list[Service] = []  # of this process


class Steps:
    """Holds the UNet's calls of this process: each waits until it is let through."""

    def __init__(self) -> None:
        self.asked = self.done = 0
        self.shared_by: list[int] = []  # edits of each call
        self._allowed: float = 0
        self._turn = threading.Condition()

    def let(self, count: float = float("inf")) -> None:
        """Let ``count`` more calls through, all of them without one."""
        with self._turn:
            self._allowed += count
            self._turn.notify_all()

    def reach(self, count: int) -> None:
        """Let calls through up to number ``count``, and wait until the next one wants to begin."""
        self.let(count - self.done)
        until(lambda: self.asked == count + 1, f"call {count + 1} of the UNet")

    def around(self, step: Callable[..., None]) -> Callable[..., None]:
        def held(bank: EditBank, slots: list[int]) -> None:
            with self._turn:
                self.asked += 1
                self.shared_by.append(len(slots))
                self._turn.wait_for(lambda: self._allowed >= self.asked, PATIENCE_S)
            step(bank, slots)
            self.done += 1

        return held


class FixedCost(StepCost):
    """A tenth of a second a row, whatever is measured."""

    def __init__(self) -> None:
        super().__init__({1: 0.1})

    def note(self, rows: int, seconds: float) -> None:
        pass


class SlowCheck:
    """A check of pictures that looks at the next one that comes in for as long as it is told to, and then at none."""

    def __init__(self) -> None:
        self.looking, self.enough = threading.Event(), threading.Event()

    def __call__(self, picture: np.ndarray, which: str) -> str | None:
        if which == "input" and not self.looking.is_set():
            self.looking.set()
            self.enough.wait(PATIENCE_S)
        return None


@contextlib.contextmanager
def busy(service: Service, steps: Steps, **fields: typing.Any) -> Iterator[Future[requests.Response]]:
    """Somebody's edit is under way at ``service``, held at a step; whatever happens, it goes on at the end."""
    with ThreadPoolExecutor(1) as person:
        asked = steps.asked
        answer = person.submit(service.edit, **fields)
        try:
            until(lambda: steps.asked > asked, "somebody's edit has begun")
            yield answer
        finally:
            steps.let()
    assert answer.result().status_code == 200


# ---- the command


@dataclasses.dataclass
class Command(Address):
    """``ip2p serve`` in a process of its own."""

    process: subprocess.Popen[bytes] = dataclasses.field(kw_only=True)
    log: Path = dataclasses.field(kw_only=True)

    def peak_growth(self, ask: Callable[[], typing.Any]) -> int:
        """By how many bytes the memory of the process is larger at its largest during ``ask`` than before."""
        folder = Path("/proc") / str(self.process.pid)
        (folder / "clear_refs").write_text("5")  # begin to watch the peak anew
        before = psutil.Process(self.process.pid).memory_info().rss
        ask()
        found = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
        assert found
        return int(found[1]) * 1024 - before


@contextlib.contextmanager
def commanded(folder: Path, log: Path, *flags: str, key: str | None = None) -> Iterator[Command]:
    """``python -m ip2p serve`` with the tiny model in ``folder``, ready; killed at the end if it still runs."""
    named = ["--model", f"tiny={folder}", "--port", "0", "--threads", "1", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "IP2P_API_KEYS"}
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "ip2p", "serve", *named, *flags], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        found = until(lambda: process.poll() is not None or _announced(log), "an address in the log", 60)
        assert process.poll() is None, log.read_text()
        command = Command(found, key, process=process, log=log)
        until(lambda: command.get("/readyz").status_code == 200, "a command that is ready", 60)
        yield command
    finally:
        process.kill()
        process.wait()


def _announced(log: Path) -> str | None:
    found = re.search(r"Uvicorn running on (http://127\.0\.0\.1:\d+)", log.read_text())
    return found[1] if found else None
