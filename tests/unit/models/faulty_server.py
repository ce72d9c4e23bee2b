"""A web server of a folder that misbehaves on demand: breaks off, stalls, lies, sends other bytes, is busy."""

from __future__ import annotations

import collections
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """Serves ``folder``. ``fault`` (one of the names below) strikes the first ``times`` reads of ``name``."""

    def __init__(self, folder: Path):
        self.folder, self.fault, self.name, self.times = folder, "", "", 0
        self.struck = 0
        self.asked: list[tuple[str, str]] = []  # name, Range
        self.sent: collections.Counter[str] = collections.Counter()  # bytes by name
        self.etag = '"one"'
        self.slow_s = 0.0  # between pieces
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_port}/weights"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def strike(self, fault: str, name: str, times: int = 1) -> None:
        self.fault, self.name, self.times, self.struck = fault, name, times, 0

    def _strikes(self, name: str) -> str:
        with self._lock:
            if name != self.name or self.struck >= self.times:
                return ""
            self.struck += 1
            return self.fault

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/weights/")
        asked = request.headers.get("Range", "")
        self.asked.append((name, asked))
        path = self.folder / name
        if not path.is_file():
            request.send_error(404)
            return
        data, fault = path.read_bytes(), self._strikes(name)
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0) if asked else 0
        if request.headers.get("If-Range", self.etag) != self.etag:
            start = 0
        if fault == "busy":
            request.send_error(503)
            return
        if fault == "page":
            data, start = b"<html>please log in</html>", 0
        if fault == "other bytes":
            data = data[:-1] + bytes([data[-1] ^ 1])
        body, claimed = data[start:], len(data) - start
        if fault == "shorter":
            body, claimed = body[:-7], claimed - 7
        if fault == "longer":
            body, claimed = body + b"1234567", claimed + 7
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(claimed))
        request.end_headers()
        if fault in ("break off", "stall"):
            body = body[: len(body) // 2]
        self._send(request, name, body)
        if fault == "stall":
            time.sleep(5)
        if fault in ("break off", "stall"):
            request.close_connection = True

    def _send(self, request: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
        for start in range(0, len(body), 2**16):
            piece = body[start : start + 2**16]
            try:
                request.wfile.write(piece)
            except OSError:
                return
            with self._lock:
                self.sent[name] += len(piece)
            if self.slow_s:
                time.sleep(self.slow_s)
