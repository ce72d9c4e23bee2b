"""Answers of an S3 store that are cut off at any byte: read whole or known as cut, never taken for short ones."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import pytest

from ip2p.errors import StorageError
from ip2p.storage import Folder, open_folder

BODY = b"a record that must be whole\n"
ANSWER = (
    b"HTTP/1.1 200 OK\r\nLast-Modified: Sat, 28 Nov 2026 20:08:00 GMT\r\nContent-Type: text/plain\r\n"
    b'Content-Length: %d\r\nETag: "0123456789abcdef"\r\nConnection: close\r\n\r\n' % len(BODY)
) + BODY


class Store(socketserver.ThreadingTCPServer):
    """Gives the first ``length`` bytes of ANSWER to whatever it is asked."""

    daemon_threads = True
    length = 0

    class RequestHandlerClass(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() != b"\r\n":
                pass
            self.wfile.write(ANSWER[: self.server.length])

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "body")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # between tries
    return open_folder("s3://bucket/records")


def test_a_whole_answer_is_read(store, folder):
    store.length = len(ANSWER)
    assert folder.read("part.jsonl") == BODY


@pytest.mark.parametrize("ask", ["read", "exists", "write", "write_if", "delete"])
def test_an_answer_cut_anywhere_is_known_as_such(store, folder, ask):
    given = (b"data",) if ask.startswith("write") else ()
    found = {}
    for store.length in range(len(ANSWER)):
        try:
            answer = getattr(folder, ask)("part.jsonl", *given)
            # To others than "read", the status line says all; what they are told must be true.
            if ask == "read" or answer not in (None, True, "0123456789abcdef"):
                found[store.length] = repr(answer)
        except StorageError as error:
            if error.kind != "away":
                found[store.length] = f"{error.kind}: {error}"
        except Exception as error:
            found[store.length] = repr(error)
    assert found == {}
