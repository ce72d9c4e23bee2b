"""Answers of an S3 store that are cut off at any byte: read whole or known as cut, never taken for short ones."""

from __future__ import annotations

import io
import socketserver
import threading
from collections.abc import Iterator

import pytest

from ip2p.errors import StorageError
from ip2p.storage import Folder, open_folder

HEAD = (
    b"HTTP/1.1 200 OK\r\nLast-Modified: Sat, 28 Nov 2026 20:08:00 GMT\r\nContent-Type: application/xml\r\n"
    b'Content-Length: %d\r\nETag: "0123456789abcdef"\r\nConnection: close\r\n\r\n'
)
RECORD = b"a record that must be whole\n"
LISTING = (
    b"<ListBucketResult><Name>bucket</Name><Prefix>records/</Prefix><IsTruncated>false</IsTruncated><Contents><Key>"
    b"records/part.jsonl</Key><ETag>0123</ETag><Size>28</Size></Contents></ListBucketResult>"
)


class Store(socketserver.ThreadingTCPServer):
    """Gives the first ``length`` bytes of ``answer`` to whatever it is asked."""

    daemon_threads = True
    answer = b""
    length = 0

    def gives(self, body: bytes) -> None:
        self.answer = HEAD % len(body) + body
        self.length = len(self.answer)

    class RequestHandlerClass(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() != b"\r\n":
                pass
            self.wfile.write(self.server.answer[: self.server.length])

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


def test_whole_answers_are_read(store, folder):
    store.gives(RECORD)
    assert folder.read("part.jsonl") == RECORD
    store.gives(LISTING)
    assert folder.list() == ["part.jsonl"]


def test_an_upload_in_parts_whose_number_was_cut_off_is_known_as_cut(store, folder):
    store.gives(RECORD)
    store.length = store.answer.index(b"Content-Length")
    with pytest.raises(StorageError, match="the answer was cut short") as caught:
        folder.write_from("part.bin", io.BytesIO(bytes(9 * 2**20)))
    assert caught.value.kind == "away"


@pytest.mark.parametrize("header", [b"Content-Length", b"ETag"])
def test_a_stream_that_does_not_say_how_long_or_of_what_it_is_is_known_as_cut(store, folder, header):
    store.gives(RECORD)
    store.length = store.answer.index(header)
    with pytest.raises(StorageError, match="the answer was cut short"), folder.opened("part.bin", 0, ""):
        pass


# What may be told of an answer that was cut. To those that write, its first line says that they have.
TRUE = {
    "read": (),
    "list": (),
    "exists": (True,),
    "write": (None,),
    "delete": (None,),
    "write_if": ("0123456789abcdef",),
}


@pytest.mark.parametrize("ask", TRUE)
def test_an_answer_cut_anywhere_is_known_as_such(store, folder, ask):
    store.gives(LISTING if ask == "list" else RECORD)
    given = {"list": ()}.get(ask, ("part.jsonl",)) + ((b"data",) if ask.startswith("write") else ())
    found = {}
    whole = store.length
    for store.length in range(whole):
        try:
            answer = getattr(folder, ask)(*given)
            if answer not in TRUE[ask]:
                found[store.length] = repr(answer)
        except StorageError as error:
            if error.kind != "away":
                found[store.length] = f"{error.kind}: {error}"
        except Exception as error:
            found[store.length] = repr(error)
    assert found == {}
