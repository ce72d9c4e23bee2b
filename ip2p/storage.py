"""Folders, local or ``s3://``, in which a file appears whole or not at all.

Local writes go to a temporary name, are flushed to disk and renamed; S3 writes are one PutObject. A file's version
changes when its content does (S3: ETag; local: time and size). Endpoints and keys come from the environment
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, …), as for every AWS tool.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ip2p.errors import StorageError

T = typing.TypeVar("T")


class Folder(typing.Protocol):
    """What the project needs of a place to keep files. Names are relative, with ``/`` between parts."""

    uri: str

    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def write_from(self, name: str, stream: typing.BinaryIO) -> None:
        """Write what ``stream`` holds from where it stands, without holding it in memory."""
        ...

    def exists(self, name: str) -> bool: ...
    def list(self, prefix: str = "") -> list[str]: ...
    def versions(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Names as ``list`` gives them, each with its version; not held all at once."""
        ...

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        """A file and the version that was read."""
        ...

    def write_if(self, name: str, data: bytes, version: str | None = None) -> str | None:
        """Write if the file has that ``version`` (None: if there is none). The new version, or None: it was not so."""
        ...

    def delete(self, name: str) -> None: ...


def open_folder(uri: str) -> Folder:
    """A local folder (made when first written) or ``s3://bucket/prefix``."""
    if uri.startswith("s3://"):
        bucket, _, prefix = uri[5:].partition("/")
        if not bucket:
            raise StorageError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        return S3Folder(bucket, prefix.strip("/"))
    if "://" in uri:
        raise StorageError(f"{uri!r}: only local paths and s3:// are supported")
    return LocalFolder(Path(uri))


def read_file(uri: str) -> bytes:
    """The bytes of one local or ``s3://`` file."""
    if "://" not in uri:
        path = Path(uri)
        return LocalFolder(path.parent).read(path.name)
    folder, name = _parted(uri)
    return folder.read(name)


def open_file(uri: str) -> typing.BinaryIO:
    """One local or ``s3://`` file, to be read from its start and closed; an object is copied to a temporary file."""
    if "://" not in uri:
        try:
            return Path(uri).open("rb")
        except FileNotFoundError as error:
            raise StorageError(f"{uri}: no such file", "missing") from error
        except OSError as error:
            raise _os_error("read", Path(uri), error) from error
    folder, name = _parted(uri)
    copy = typing.cast(typing.BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  the caller closes it
    try:
        folder.download(name, copy)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy


def _parted(uri: str) -> tuple[S3Folder, str]:
    """The folder and the name of an ``s3://`` file."""
    folder, _, name = uri.rpartition("/")
    if not name or folder == "s3:/":
        raise StorageError(f"{uri!r} names no file; write s3://bucket/file")
    return typing.cast(S3Folder, open_folder(folder)), name


def remove_all(folder: Folder, prefix: str) -> None:
    """Delete everything below ``prefix`` (a name that ends in ``/``), local directories too."""
    for name in folder.list(prefix):
        folder.delete(name)
    if isinstance(folder, LocalFolder):
        shutil.rmtree(folder.root / prefix, ignore_errors=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LocalFolder:
    def __init__(self, root: Path):
        self.root = root
        self.uri = str(root)

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file", "missing") from error
        except OSError as error:
            raise _os_error("read", path, error) from error

    def write(self, name: str, data: bytes) -> None:
        self.write_from(name, io.BytesIO(data))

    def write_from(self, name: str, stream: typing.BinaryIO) -> None:
        path = self.root / name
        temporary = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                shutil.copyfileobj(stream, file, 2**20)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # noqa: PTH101  mkstemp makes it private
            os.replace(temporary, path)  # noqa: PTH105
            _flush_folder(path.parent)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise _os_error("write", path, error, _size_of(stream)) from error

    def exists(self, name: str) -> bool:
        try:
            return (self.root / name).is_file()
        except OSError as error:
            raise _os_error("read", self.root / name, error) from error

    def list(self, prefix: str = "") -> list[str]:
        """Names of the whole files whose name starts with ``prefix``, sorted; leftovers of a killed write are not."""
        names = []
        # Only the folder that the prefix names is walked, so that listing a shard folder never reads its siblings.
        start = self.root / prefix if prefix.endswith("/") else self.root / Path(prefix).parent

        def unreadable(error: OSError) -> None:
            # An unreadable folder must not look like an empty one: its work would be done again.
            if error.errno != errno.ENOENT:
                raise _os_error("list", start, error) from error

        for folder, _, files in os.walk(start, onerror=unreadable):
            for file in files:
                if not file.endswith(".partial"):
                    names.append(os.path.relpath(os.path.join(folder, file), self.root))  # noqa: PTH118
        return sorted(name for name in names if name.startswith(prefix))

    def versions(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name in self.list(prefix):
            try:
                yield name, _version((self.root / name).stat())
            except FileNotFoundError:
                continue  # deleted since
            except OSError as error:
                raise _os_error("read", self.root / name, error) from error

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        path = self.root / name
        try:
            with path.open("rb") as file:
                return file.read(), _version(os.fstat(file.fileno()))
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file", "missing") from error
        except OSError as error:
            raise _os_error("read", path, error) from error

    def write_if(self, name: str, data: bytes, version: str | None = None) -> str | None:
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                there = _version(path.stat()) if path.exists() else None
                if there != version:
                    return None
                self.write(name, data)
                return _version(path.stat())
        except OSError as error:
            raise _os_error("write", path, error, len(data)) from error

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


class S3Folder:
    def __init__(self, bucket: str, prefix: str):
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        retries = {"mode": "standard", "max_attempts": 5}
        config = Config(retries=retries, connect_timeout=5, read_timeout=30, max_pool_connections=32)
        try:
            self.client = boto3.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            remedy = "check AWS_ENDPOINT_URL and AWS_PROFILE"
            raise StorageError(f"{self.uri}: cannot set up S3: {error}; {remedy}") from error

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _call(self, verb: str, name: str, action: typing.Callable[[], typing.Any]) -> typing.Any:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return action()
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise _s3_error(verb, f"s3://{self.bucket}/{self._key(name)}", error) from error
        except (KeyError, ValueError) as error:  # a field that all answers have, or a part of a date or a number in one
            raise self._cut(name) from error

    def read(self, name: str) -> bytes:
        return self.read_versioned(name)[0]

    def download(self, name: str, stream: typing.BinaryIO) -> None:
        """Copy an object into ``stream`` piece by piece."""

        def copy() -> None:
            stream.seek(0)
            stream.truncate()
            answer = self.client.get_object(Bucket=self.bucket, Key=self._key(name))
            shutil.copyfileobj(answer["Body"], stream, 2**20)
            self._whole(name, answer, stream.tell(), None)

        try:
            self._call("read", name, copy)
        except OSError as error:
            raise _os_error("write", Path(tempfile.gettempdir()), error) from error

    def write(self, name: str, data: bytes) -> None:
        self._call("write", name, lambda: self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data))

    def write_from(self, name: str, stream: typing.BinaryIO) -> None:
        self._call("write", name, lambda: self.client.upload_fileobj(stream, self.bucket, self._key(name)))

    def exists(self, name: str) -> bool:
        from botocore.exceptions import ClientError

        def head() -> bool:
            try:
                self.client.head_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return False
                raise
            return True

        return bool(self._call("read", name, head))

    def list(self, prefix: str = "") -> list[str]:
        return sorted(name for name, _ in self.versions(prefix))

    def versions(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, item in self._objects(prefix):
            yield name, item["ETag"].strip('"')

    def sizes(self) -> Iterator[tuple[str, int]]:
        """All names, each with its bytes."""
        for name, item in self._objects(""):
            yield name, int(item["Size"])

    def _objects(self, prefix: str) -> Iterator[tuple[str, typing.Any]]:
        """Names that begin with ``prefix``, each with what the store says of it; a page at a time."""
        skip = len(self._key(""))
        pages = iter(
            self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
        )
        while page := self._call("list", prefix, lambda: next(pages, None)):
            if "IsTruncated" not in page:  # cut inside its headers, it would look like the page of an empty folder
                raise self._cut(prefix)
            for item in page.get("Contents", ()):
                yield item["Key"][skip:], item

    @contextmanager
    def opened(self, name: str, start: int, version: str) -> Iterator[tuple[typing.Any, int, int, str]]:
        """A stream, the byte it begins at (0 where the object is no longer of ``version``), all bytes, its version."""
        from botocore.exceptions import ClientError

        def get() -> typing.Any:
            if start and version:
                try:
                    asked = {"Range": f"bytes={start}-", "IfMatch": f'"{version}"'}
                    return self.client.get_object(Bucket=self.bucket, Key=self._key(name), **asked)
                except ClientError as error:
                    if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (412, 416):
                        raise
            return self.client.get_object(Bucket=self.bucket, Key=self._key(name))

        answer = self._call("read", name, get)
        if "ContentLength" not in answer:
            raise self._cut(name)
        begin = start if "ContentRange" in answer else 0
        with contextlib.closing(answer["Body"]) as body:
            yield body, begin, begin + answer["ContentLength"], self._version(name, answer)

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        def get() -> tuple[bytes, str]:
            answer = self.client.get_object(Bucket=self.bucket, Key=self._key(name))
            data = answer["Body"].read()
            return self._whole(name, answer, len(data), data), self._version(name, answer)

        return typing.cast(tuple[bytes, str], self._call("read", name, get))

    def _whole(self, name: str, answer: typing.Any, found: int, data: T) -> T:
        """An answer that was cut inside its headers looks like a short one."""
        if answer.get("ContentLength") != found:
            raise self._cut(name)
        return data

    def _version(self, name: str, answer: typing.Any) -> str:
        tag = str(answer.get("ETag", ""))
        if not tag.strip('"') or tag.startswith('"') != tag.endswith('"'):
            raise self._cut(name)
        return tag.strip('"')

    def _cut(self, name: str) -> StorageError:
        return StorageError(f"s3://{self.bucket}/{self._key(name)}: the answer was cut short; try again", "away")

    def write_if(self, name: str, data: bytes, version: str | None = None) -> str | None:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}

        def put() -> str | None:
            try:
                answer = self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **condition)
            except ClientError as error:
                # 409: another conditional write of this name is under way; 404: what was to be replaced is gone.
                lost = error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412)
                if lost and error.response["Error"]["Code"] != "NoSuchBucket":
                    return None
                raise
            return self._version(name, answer)

        return typing.cast("str | None", self._call("write", name, put))

    def delete(self, name: str) -> None:
        self._call("delete", name, lambda: self.client.delete_object(Bucket=self.bucket, Key=self._key(name)))


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size_of(stream: typing.BinaryIO) -> int:
    return stream.seek(0, io.SEEK_END)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process is in here with the same ``folder``; the kernel lets go of a process that dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns}-{stat.st_size}"


NO_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Too long, below a file, or that of a folder."""


def _os_error(verb: str, path: Path, error: OSError, size: int = 0) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f" (needed {size} bytes)" if size else ""
        return StorageError(f"{path}: the disk is full{needed}; free space and run the same command again", "full")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path}: no permission to {verb} it; choose another folder or change its rights", "denied")
    kind = "name" if error.errno in NO_NAME else "other"
    return StorageError(f"{path}: cannot {verb} it: {error.strerror or error}", kind)


# Codes of stores, and names of boto's own errors where no store was asked.
BAD_NAME = ("KeyTooLongError", "ParamValidationError")
WRONG_KEYS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestExpired",
    "NoCredentialsError", "PartialCredentialsError",
)  # fmt: skip


def _s3_error(verb: str, where: str, error: Exception) -> StorageError:
    response = getattr(error, "response", None) or {}
    code = response.get("Error", {}).get("Code", "") if response else type(error).__name__
    if code in ("NoSuchKey", "404"):
        return StorageError(f"{where}: no such object", "missing")
    if code == "NoSuchBucket":
        return StorageError(f"{where}: no such bucket; create it or correct the name")
    if code in BAD_NAME:
        return StorageError(f"{where}: no object can have this name ({' '.join(str(error).split())})", "name")
    if code in ("AccessDenied", "403", *WRONG_KEYS):
        remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket policy"
        kind = "refused" if code in WRONG_KEYS else "denied"
        return StorageError(f"{where}: {verb} refused ({code}); {remedy}", kind)
    if not response:
        remedy = "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        return StorageError(f"{where}: cannot reach the store ({error}); {remedy}", "away")
    busy = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500 or code in ("SlowDown", "Throttling")
    return StorageError(f"{where}: {verb} failed: {error}", "away" if busy else "other")
