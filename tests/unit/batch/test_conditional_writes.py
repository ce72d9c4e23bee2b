"""What a batch needs of storage: writes that only one wins, versions, streams, and errors that say what to do next."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ip2p.errors import StorageError
from ip2p.storage import Folder, LocalFolder, open_file, open_folder

RACERS = 8


def race(start: Callable[[int], object]) -> list[object]:
    """What each of many threads gets that begin at once."""
    answers: list[object] = [None] * RACERS
    line = threading.Barrier(RACERS)

    def run(number: int) -> None:
        line.wait()
        answers[number] = start(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# ---- conditional writes


def test_a_file_that_is_not_there_is_written_and_its_version_told(folder):
    version = folder.write_if("a/b.bin", b"one")
    assert folder.read_versioned("a/b.bin") == (b"one", version)
    assert dict(folder.versions()) == {"a/b.bin": version}


def test_a_file_that_is_there_is_left_alone(folder):
    folder.write("a.bin", b"one")
    assert folder.write_if("a.bin", b"two") is None
    assert folder.read("a.bin") == b"one"


def test_a_file_is_replaced_only_if_it_has_the_version(folder):
    first = folder.write_if("a.bin", b"one")
    second = folder.write_if("a.bin", b"two", first)
    assert second is not None
    assert second != first
    assert folder.read_versioned("a.bin") == (b"two", second)
    assert folder.write_if("a.bin", b"three", first) is None
    assert folder.write_if("a.bin", b"three") is None
    assert folder.read_versioned("a.bin") == (b"two", second)


def test_a_file_that_is_gone_has_no_version_any_more(folder):
    version = folder.write_if("a.bin", b"one")
    folder.delete("a.bin")
    assert folder.write_if("a.bin", b"two", version) is None
    assert not folder.exists("a.bin")
    assert folder.write_if("a.bin", b"two") is not None


def test_of_many_that_write_a_new_file_one_wins_and_it_is_the_file(folder):
    for name in ("a", "b"):
        versions = race(lambda number, name=name: folder.write_if(name, b"%02d" % number))
        (winner,) = [number for number, version in enumerate(versions) if version is not None]
        assert folder.read_versioned(name) == (b"%02d" % winner, versions[winner])


def test_of_many_that_replace_one_version_one_wins_and_it_is_the_file(folder):
    version = folder.write_if("a", b"old")
    versions = race(lambda number: folder.write_if("a", b"%02d " % number, version))
    (winner,) = [number for number, one in enumerate(versions) if one is not None]
    assert folder.read_versioned("a") == (b"%02d " % winner, versions[winner])


def test_no_count_is_lost_where_all_count_on_one_file(folder):
    folder.write("count", b"000")

    def count(number: int) -> None:
        written = None
        while written is None:
            data, version = folder.read_versioned("count")
            written = folder.write_if("count", b"%03d" % (int(data) + 1), version)

    race(count)
    assert folder.read("count") == b"%03d" % RACERS


def test_folders_of_other_processes_race_too(tmp_path):
    import subprocess
    import sys

    program = (
        "import sys; from pathlib import Path; from ip2p.storage import LocalFolder\n"
        "folder = LocalFolder(Path(sys.argv[1]))\n"
        "print(sum(folder.write_if(f'{name}', b'x') is not None for name in range(200)))"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert sum(int(one.communicate()[0]) for one in others) == 200


def test_a_conditional_write_leaves_nothing_but_the_file(tmp_path):
    LocalFolder(tmp_path).write_if("a", b"one")
    LocalFolder(tmp_path).write_if("a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- versions


def test_a_version_changes_with_the_content_and_only_then(folder):
    seen = []
    for data in (b"one", b"two", b"three", b""):
        folder.write("a", data)
        assert folder.read_versioned("a") == folder.read_versioned("a")
        seen.append(folder.read_versioned("a")[1])
    assert len(set(seen)) == 4


def test_versions_are_those_of_the_names_below_a_prefix(folder):
    for name in ("in/b", "in/a", "in/deep/c", "inner", "top"):
        folder.write(name, name.encode())
    assert [name for name, _ in folder.versions("in/")] == ["in/a", "in/b", "in/deep/c"]
    assert [name for name, _ in folder.versions()] == sorted(folder.list())
    assert dict(folder.versions("in")) == {name: folder.read_versioned(name)[1] for name in folder.list("in")}
    assert list(folder.versions("nothing/")) == []


def test_a_file_that_is_deleted_while_versions_are_listed_is_left_out(tmp_path):
    folder = LocalFolder(tmp_path)
    for name in ("a", "b", "c"):
        folder.write(name, b"")
    versions = folder.versions()
    assert next(versions)[0] == "a"
    folder.delete("b")
    assert [name for name, _ in versions] == ["c"]


@pytest.mark.service
def test_more_objects_than_an_answer_holds_are_all_listed(s3_uri, monkeypatch):
    folder = open_folder(s3_uri)
    for number in range(7):
        folder.write(f"{number}", b"")
    paginate = type(folder.client.get_paginator("list_objects_v2")).paginate
    monkeypatch.setattr(
        type(folder.client.get_paginator("list_objects_v2")),
        "paginate",
        lambda self, **asked: paginate(self, **asked, PaginationConfig={"PageSize": 3}),
    )
    assert [name for name, _ in folder.versions()] == [str(number) for number in range(7)]


# ---- streams


def test_a_stream_is_written_from_where_it_stands(folder):
    stream = io.BytesIO(b"headbody")
    stream.seek(4)
    folder.write_from("a/b", stream)
    assert folder.read("a/b") == b"body"


def test_a_large_stream_arrives_whole_and_an_empty_one_too(folder, tmp_path):
    data = os.urandom(12 * 2**20 + 17)
    with (tmp_path / "large").open("wb+") as stream:
        stream.write(data)
        stream.seek(0)
        folder.write_from("large", stream)
    assert folder.read("large") == data
    folder.write_from("empty", io.BytesIO())
    assert folder.read("empty") == b""


def test_a_disk_that_is_full_leaves_the_old_file_and_says_how_much_was_needed(tmp_path, monkeypatch):
    folder = LocalFolder(tmp_path)
    folder.write("a/b.bin", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"b\.bin: the disk is full \(needed 9 bytes\)") as caught:
        folder.write_from("a/b.bin", io.BytesIO(b"something"))
    assert caught.value.kind == "full"
    version = folder.read_versioned("a/b.bin")[1]
    for condition in (version, None):
        name = "a/b.bin" if condition else "a/new.bin"
        with pytest.raises(StorageError, match=r"the disk is full \(needed 3 bytes\)") as caught:
            folder.write_if(name, b"new", condition)
        assert caught.value.kind == "full"
    monkeypatch.undo()
    assert folder.read_versioned("a/b.bin") == (b"old", version)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_a_stream_that_breaks_leaves_the_old_file(tmp_path):
    class Broken(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    folder = LocalFolder(tmp_path)
    folder.write("a", b"old")
    with pytest.raises(StorageError, match="cannot write it: Input/output error"):
        folder.write_from("a", Broken(b"new"))
    assert folder.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- one file


def test_one_file_is_opened_wherever_it_lies(folder):
    folder.write("a/b.bin", b"some bytes")
    with open_file(f"{folder.uri}/a/b.bin") as stream:
        assert stream.read(4) == b"some"
        stream.seek(0)
        assert stream.read() == b"some bytes"


def test_a_file_that_is_not_there_cannot_be_opened(folder):
    folder.write("a", b"")
    with pytest.raises(StorageError, match="no such") as caught:
        open_file(f"{folder.uri}/b")
    assert caught.value.kind == "missing"


def test_a_folder_cannot_be_opened_as_a_file(tmp_path):
    with pytest.raises(StorageError, match="cannot read it: Is a directory") as caught:
        open_file(str(tmp_path))
    assert caught.value.kind == "name"


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "s3://bucket/", "s3:///a"])
def test_a_uri_that_names_no_file_is_refused(uri):
    with pytest.raises(StorageError, match="names no"):
        open_file(uri)


# ---- kinds of errors


def kind_of(action: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        action()
    return caught.value.kind


def test_what_is_not_there_is_missing(folder):
    for action in (folder.read, folder.read_versioned):
        assert kind_of(lambda action=action: action("a")) == "missing"
    folder.write("b", b"")
    assert kind_of(lambda: folder.read("a")) == "missing"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EACCES, "denied"), (errno.EPERM, "denied"), (errno.EROFS, "denied"), (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"), (errno.ENAMETOOLONG, "name"), (errno.EIO, "other"),
    ],
)  # fmt: skip
def test_what_a_disk_says_is_of_a_kind(tmp_path, monkeypatch, code, kind):
    folder = LocalFolder(tmp_path)
    folder.write("a", b"")
    version = folder.read_versioned("a")[1]

    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fails)
    for action in (
        lambda: folder.write("a", b"1"),
        lambda: folder.write_from("a", io.BytesIO()),
        lambda: folder.write_if("a", b"1", version),
    ):
        assert kind_of(action) == kind
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr("ip2p.storage._version", fails)
    for action in (lambda: folder.read("a"), lambda: folder.read_versioned("a"), lambda: list(folder.versions())):
        assert kind_of(action) == kind


def asked_once(monkeypatch: pytest.MonkeyPatch, uri: str, endpoint: str = "http://127.0.0.1:9", **keys: str) -> Folder:
    """A folder of ``endpoint``, where nobody listens unless it is another, which is not tried again."""
    import boto3
    from botocore.config import Config

    session = boto3.Session(region_name="us-east-1", **keys)
    client = session.client("s3", endpoint_url=endpoint, config=Config(retries={"max_attempts": 0}))
    monkeypatch.setattr("boto3.client", lambda *_, **__: client)
    return open_folder(uri)


KEYS = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}


@pytest.mark.service
@pytest.mark.parametrize("keys", [("nobody", "testsecret"), ("testkey", "wrong")])
def test_keys_that_are_wrong_are_refused(s3_server, s3_uri, monkeypatch, keys):
    named = dict(zip(KEYS, keys, strict=True))
    folder = asked_once(monkeypatch, s3_uri, s3_server.endpoint, **named)
    for action in (
        lambda: folder.read("a"),
        lambda: folder.read_versioned("a"),
        lambda: folder.write_if("a", b""),
        lambda: list(folder.versions()),
    ):
        assert kind_of(action) == "refused"


def test_a_store_that_is_out_of_reach_is_away(monkeypatch):
    folder = asked_once(monkeypatch, "s3://bucket/x", **KEYS)
    for action in (
        lambda: folder.read("a"),
        lambda: folder.write_if("a", b""),
        lambda: folder.write_from("a", io.BytesIO(b"x")),
        lambda: folder.exists("a"),
        lambda: list(folder.versions()),
    ):
        assert kind_of(action) == "away"


def test_no_keys_at_all_are_no_outage(monkeypatch):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "PROFILE", "SESSION_TOKEN"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("SHARED_CREDENTIALS_FILE", "CONFIG_FILE"):
        monkeypatch.setenv(f"AWS_{name}", os.devnull)
    folder = asked_once(monkeypatch, "s3://bucket/x")
    assert kind_of(lambda: folder.read("a")) == "refused"


def test_a_name_that_no_store_takes_is_no_outage(monkeypatch):
    # One such image in a manifest would have the whole batch wait for --outage and stop.
    for bucket, name in (("bucket", ""), ("a bucket", "x.png")):
        folder = asked_once(monkeypatch, f"s3://{bucket}", **KEYS)
        assert kind_of(lambda folder=folder, name=name: folder.read_versioned(name)) == "name"


class Answering:
    """The network's edge of an S3 client: every call is answered with an error of ``code`` and ``status``."""

    def __init__(self, code: str, status: int):
        self.code, self.status = code, status

    def __getattr__(self, operation: str) -> Callable[..., object]:
        from botocore.exceptions import ClientError

        def call(**_: object) -> object:
            answer = {"Error": {"Code": self.code}, "ResponseMetadata": {"HTTPStatusCode": self.status}}
            raise ClientError(answer, operation)

        return call


def answering(monkeypatch: pytest.MonkeyPatch, client: object) -> Folder:
    monkeypatch.setattr("boto3.client", lambda *_, **__: client)
    return open_folder("s3://bucket/x")


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("NoSuchKey", 404, "missing"),
        ("404", 404, "missing"),
        ("AccessDenied", 403, "denied"),
        ("403", 403, "denied"),
        *[(code, 403, "refused") for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestExpired")],
        *[(code, 400, "refused") for code in ("ExpiredToken", "InvalidToken")],
        *[(code, 503, "away") for code in ("SlowDown", "ServiceUnavailable")],
        ("InternalError", 500, "away"),
        ("SlowDown", 429, "away"),
        ("Throttling", 400, "away"),
        ("NoSuchBucket", 404, "other"),
        ("EntityTooLarge", 400, "other"),
        ("KeyTooLongError", 400, "name"),
    ],
)
def test_what_a_store_answers_is_of_a_kind(monkeypatch, code, status, kind):
    folder = answering(monkeypatch, Answering(code, status))
    assert kind_of(lambda: folder.read("a")) == kind
    assert kind_of(lambda: folder.read_versioned("a")) == kind
    assert kind_of(lambda: folder.write("a", b"")) == kind


@pytest.mark.parametrize(
    ("code", "status"),
    [("PreconditionFailed", 412), ("ConditionalRequestConflict", 409), ("NoSuchKey", 404)],
)
def test_a_condition_that_does_not_hold_is_no_error(monkeypatch, code, status):
    folder = answering(monkeypatch, Answering(code, status))
    assert folder.write_if("a", b"", "v") is None


@pytest.mark.parametrize(("code", "status", "kind"), [("SlowDown", 503, "away"), ("AccessDenied", 403, "denied")])
def test_a_conditional_write_that_fails_is_an_error(monkeypatch, code, status, kind):
    folder = answering(monkeypatch, Answering(code, status))
    assert kind_of(lambda: folder.write_if("a", b"")) == kind


def test_a_bucket_that_is_not_there_is_no_lost_race(monkeypatch):
    folder = answering(monkeypatch, Answering("NoSuchBucket", 404))
    assert kind_of(lambda: folder.write_if("a", b"")) == "other"


def test_a_full_disk_below_a_download_is_an_error_with_a_kind(monkeypatch):
    class Disk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    class Client:
        def get_object(self, **_: object) -> dict[str, object]:
            return {"Body": io.BytesIO(b"some bytes")}

    folder = answering(monkeypatch, Client())
    assert kind_of(lambda: folder.download("a", Disk())) == "full"
