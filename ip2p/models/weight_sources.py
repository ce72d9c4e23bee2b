"""Where weights come from: the Hugging Face hub, a web server, S3 or a folder: what is there, and its bytes.

A source with a manifest.json (every folder that this project wrote, or `ip2p weights mirror`) says size and SHA-256 of
each file; the hub says them too. S3 and a folder without one are taken as they are.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ip2p.errors import CheckpointError, StorageError
from ip2p.models.checkpoint import MANIFEST, read_manifest
from ip2p.storage import S3Folder, open_folder

PIECE = 2**16  # bytes; what is lost where a connection breaks off
CONNECT_S, SILENT_S = 10.0, 30.0
"""A server that says nothing for so long is asked again."""
HUB = "hf:"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a source; ``sha256`` is empty where nobody knows it."""

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Stream:
    """A file's bytes from ``start`` on, which may be before the place that was asked for."""

    start: int
    total: int  # bytes of the whole file, as the source says now
    version: str
    pieces: Iterator[bytes]


class BrokenOffError(Exception):
    """The bytes ended early, or never came; another try may go on from there."""


class Source(typing.Protocol):
    """``uri`` names it in messages."""

    uri: str

    def files(self) -> list[RemoteFile]:
        """Raises StorageError or CheckpointError where they cannot be listed."""
        ...

    def read(self, name: str, start: int, version: str) -> typing.ContextManager[Stream]:
        """``version`` is that of the bytes before ``start``; of another one all is read anew. Raises BrokenOffError."""
        ...


def open_source(uri: str) -> Source:
    """``hf:OWNER/NAME[@REVISION]``, ``https://…`` and ``s3://…`` of a folder, or a local folder."""
    if uri.startswith(HUB):
        return HubSource(uri)
    if uri.startswith(("http://", "https://")):
        return WebSource(uri.rstrip("/"))
    if uri.startswith("s3://"):
        return S3Source(uri.rstrip("/"))
    return FolderSource(Path(uri))


class WebSource:
    """A folder on a web server, with a manifest.json. Resumes by Range and If-Range."""

    def __init__(self, uri: str, headers: Mapping[str, str] | None = None):
        import urllib3

        self.uri, self.headers = uri, dict(headers or {})
        timeout = urllib3.Timeout(connect=CONNECT_S, read=SILENT_S)
        self._pool = urllib3.PoolManager(maxsize=16, retries=urllib3.Retry(0, redirect=5), timeout=timeout)

    def files(self) -> list[RemoteFile]:
        with self.read(MANIFEST, 0, "") as stream:
            data = b"".join(stream.pieces)
        return _listed(data, f"{self.uri}/{MANIFEST}")

    def url(self, name: str) -> str:
        return f"{self.uri}/{name}"

    @contextmanager
    def read(self, name: str, start: int, version: str) -> Iterator[Stream]:
        import urllib3

        asked = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
        headers = {**self.headers, **asked, "Accept-Encoding": "identity"}
        try:
            answer = self._pool.request("GET", self.url(name), headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise BrokenOffError(f"{self.url(name)}: {error}") from error
        try:
            yield self._stream(name, answer, start)
        finally:
            answer.close()

    def _stream(self, name: str, answer: typing.Any, start: int) -> Stream:
        where = self.url(name)
        if answer.status in (429, 500, 502, 503, 504):
            raise BrokenOffError(f"{where}: HTTP {answer.status}")
        if answer.status in (401, 403):
            raise StorageError(f"{where}: refused (HTTP {answer.status}); set HF_TOKEN, or ask for access", "denied")
        if answer.status not in (200, 206):
            raise StorageError(f"{where}: HTTP {answer.status}; correct the address", "missing")
        version = answer.headers.get("ETag", "")
        if answer.status == 206:
            first, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            begin = first.partition("-")[0]
            if not (begin.isdigit() and total.isdigit()):
                raise BrokenOffError(f"{where}: part of a file without saying which")
            return Stream(int(begin), int(total), version, self._pieces(where, answer))
        length = answer.headers.get("Content-Length", "")
        return Stream(0, int(length) if length.isdigit() else -1, version, self._pieces(where, answer))

    def _pieces(self, where: str, answer: typing.Any) -> Iterator[bytes]:
        import urllib3

        try:
            yield from answer.stream(PIECE)
        except urllib3.exceptions.HTTPError as error:
            raise BrokenOffError(f"{where}: broke off ({error})") from error


class HubSource(WebSource):
    """A model of the Hugging Face hub (HF_ENDPOINT, HF_TOKEN): its safetensors, configs and tokenizers."""

    TAKEN = (".safetensors", ".json", ".txt", ".model")

    def __init__(self, uri: str):
        from huggingface_hub import get_token

        token = get_token()
        super().__init__(uri, {"Authorization": f"Bearer {token}"} if token else {})
        self.repository, _, revision = uri.removeprefix(HUB).partition("@")
        self.revision = revision or "main"

    def files(self) -> list[RemoteFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = HfApi().model_info(self.repository, revision=self.revision, files_metadata=True)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise StorageError(f"{self.uri}: {reason}; check the name, HF_ENDPOINT and HF_TOKEN", "missing") from error
        self.revision = info.sha or self.revision  # all files of one commit
        found = [one for one in info.siblings or [] if one.rfilename.endswith(self.TAKEN)]
        return [RemoteFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else "") for one in found]

    def url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, name, revision=self.revision)


class S3Source:
    """A folder in a bucket."""

    def __init__(self, uri: str):
        self.uri = uri
        self._folder = typing.cast(S3Folder, open_folder(uri))

    def files(self) -> list[RemoteFile]:
        if self._folder.exists(MANIFEST):
            return _listed(self._folder.read(MANIFEST), f"{self.uri}/{MANIFEST}")
        return [RemoteFile(name, size) for name, size in self._folder.sizes()]

    @contextmanager
    def read(self, name: str, start: int, version: str) -> Iterator[Stream]:
        with self._folder.opened(name, start, version) as (body, begin, total, now):
            yield Stream(begin, total, now, _pieces_of(body, f"{self.uri}/{name}"))


class FolderSource:
    """A folder of this machine, or of a disk that is mounted here."""

    def __init__(self, path: Path):
        self.uri, self.path = str(path), path

    def files(self) -> list[RemoteFile]:
        if not self.path.is_dir():
            raise StorageError(
                f"{self.path}: no such folder; name hf:OWNER/NAME, https://, s3:// or a folder", "missing"
            )
        if (self.path / MANIFEST).is_file():
            listed = read_manifest(self.path)["files"]
            return [RemoteFile(name, entry["bytes"], entry["sha256"]) for name, entry in sorted(listed.items())]
        names = sorted(path for path in self.path.rglob("*") if path.is_file())
        return [RemoteFile(path.relative_to(self.path).as_posix(), path.stat().st_size) for path in names]

    @contextmanager
    def read(self, name: str, start: int, version: str) -> Iterator[Stream]:
        path = self.path / name
        try:
            with path.open("rb") as file:
                status = path.stat()
                now = f"{status.st_mtime_ns}-{status.st_size}"
                begin = start if version == now else 0
                file.seek(begin)
                yield Stream(begin, status.st_size, now, _pieces_of(file, str(path)))
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file", "missing") from error


def _pieces_of(file: typing.Any, where: str) -> Iterator[bytes]:
    while True:
        try:
            piece = file.read(PIECE)
        except Exception as error:  # whatever the store's client raises when a connection ends
            raise BrokenOffError(f"{where}: broke off ({error})") from error
        if not piece:
            return
        yield piece


def _listed(data: bytes, where: str) -> list[RemoteFile]:
    try:
        listed = json.loads(data)["files"]
        return [RemoteFile(name, int(one["bytes"]), str(one["sha256"])) for name, one in sorted(listed.items())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = data[:40].decode(errors="replace").strip()
        raise CheckpointError(
            f"{where}: found {found!r}, expected a manifest of sizes and sha256; name a folder that "
            "`ip2p weights mirror` made"
        ) from error
