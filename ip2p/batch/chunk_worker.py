"""Edits chunks of items: fetch, edit, write, record. No Ray in here; an actor holds one of these.

A window of items is under way at a time, each in a thread of its own that mostly waits: for the store, or for the
engine, which takes edits from the whole window and so never waits for the slowest of a chunk. Several chunks may run
at a time; the next one's items begin as soon as there is room.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import threading
import time
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ip2p.batch.attempts import note_attempt
from ip2p.batch.failures import ATTEMPTS, FATAL, OWN, Failure, failure_of, meaning_of, through_outages, wait_s
from ip2p.batch.item import Item
from ip2p.batch.records import DONE, FAILED, Record, write_part
from ip2p.editing.edit_request import EditRequest
from ip2p.errors import InputError, JobError, PictureError, StorageError
from ip2p.images import carried_text, encode_image
from ip2p.pictures import decode_mask, decode_picture
from ip2p.storage import Folder, open_folder

WINDOW = 32  # items under way
MAX_PIXELS = 16_000_000
OUTAGE_S = 600.0

T = typing.TypeVar("T")


class Editing(typing.Protocol):
    """What edits: an engine in this process, or a server elsewhere. For use by many threads."""

    @property
    def row_evals(self) -> int:
        """So far."""
        ...

    def edit(self, request: EditRequest) -> np.ndarray:
        """The edited picture ``(H, W, 3)`` uint8, when it is there."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ChunkDone:
    """What a chunk came to. ``reasons`` counts the codes of failures."""

    done: int = 0
    skipped: int = 0  # of the done ones: were there already
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    row_evals: int = 0  # of the worker, so far
    edit_s: tuple[float, ...] = ()  # of each item that was edited: from first read to last write


class ItemFailedError(Exception):
    """An item will not be done; its record says why."""

    def __init__(self, failure: Failure, attempts: int):
        super().__init__(failure.message)
        self.failure, self.attempts = failure, attempts


class ChunkWorker:
    """Edits with ``editing`` into ``output``. ``model`` names all that decides results beside the items themselves."""

    def __init__(
        self,
        output: Folder,
        model: str,
        editing: Editing,
        *,
        fence: int = 1,
        window: int = WINDOW,
        max_pixels: int = MAX_PIXELS,
        outage_s: float = OUTAGE_S,
        allowed: tuple[str, ...] = (),
    ):
        self.output, self.model, self.editing = output, model, editing
        self.fence, self.max_pixels, self.outage_s, self.allowed = fence, max_pixels, outage_s, allowed
        self._threads = ThreadPoolExecutor(window, "ip2p-batch-item")
        self._stopped = threading.Event()
        self._reason: Exception = JobError("the job was stopped")
        self._lock = threading.Lock()

    def run(
        self, number: int, items: Sequence[Item], attempts: Sequence[int] = (), look_first: bool = False
    ) -> ChunkDone:
        """Do all of ``items``, write their records as part ``number``. ``attempts``: how often each failed before.

        ``look_first``: outputs may be there already (of a run that was stopped), so look before editing. Raises the
        Ip2pError that stops the job; what was written by then stays.
        """
        before = attempts or [0] * len(items)
        try:
            records = list(self._threads.map(self._one, items, before, [look_first] * len(items)))
            self._through(lambda: write_part(self.output, self.fence, number, records))
        except Exception as error:
            raise self._stop(error) from error
        return self._counted(records)

    def close(self) -> None:
        self._stopped.set()
        self._threads.shutdown(cancel_futures=True)
        self.editing.close()

    def _stop(self, error: Exception) -> Exception:
        """End all that waits; what stopped the job first."""
        with self._lock:
            if not self._stopped.is_set():
                self._reason = error
            self._stopped.set()
        return self._reason

    def _counted(self, records: Sequence[Record]) -> ChunkDone:
        codes = [record["error"]["code"] for record in records if record["status"] == FAILED]
        return ChunkDone(
            done=len(records) - len(codes),
            skipped=sum(record.get("found", False) for record in records),
            failed=len(codes),
            reasons={code: codes.count(code) for code in sorted(set(codes))},
            row_evals=self.editing.row_evals,
            edit_s=tuple(record["seconds"] for record in records if "seconds" in record),
        )

    # ---- one item

    def _one(self, item: Item, attempts: int, look_first: bool) -> Record:
        said = {"id": item.id, "line": item.line, "output": item.output, "instruction": item.instruction}
        said["image"] = item.image if not item.image.startswith("data:") else "data:"
        said["key"] = item.key(self.model)
        try:
            return {**said, "status": DONE, **self._done(item, attempts, look_first), "ended_at": int(time.time())}
        except ItemFailedError as error:
            return {**said, "status": FAILED, "error": vars(error.failure), "attempts": error.attempts}
        except Exception as error:
            self._stop(error)  # at once: the items before this one may be waiting for a store
            raise

    def _done(self, item: Item, attempts: int, look_first: bool) -> Record:
        """Read, edit, write; what is worth recording of it. Raises ItemFailedError, or what stops the job."""
        started = time.monotonic()
        tries = Tries(item.key(self.model), attempts)
        data, version = self._patiently(lambda: self._read(item.image), "read", tries)
        mask, mask_version = self._patiently(lambda: self._read(item.mask), "read", tries) if item.mask else (None, "")
        fingerprint = item.fingerprint(self.model, version, mask_version)
        kept = {"fingerprint": fingerprint, "version": version, "seed": item.seed}
        there = self._patiently(lambda: self._there(item.output), "write", tries) if look_first else None
        if there is not None and there[0] == fingerprint:
            return {**kept, "bytes": there[1], "found": True}
        request = self._patiently(lambda: self._request(item, data, mask), "read", tries)
        edited = self._patiently(lambda: self.editing.edit(request), "edit", tries)
        about = json.dumps({**provenance(item, self.model), "fingerprint": fingerprint})
        file = self._patiently(lambda: _encoded(edited, item.settings.output_format, about), "edit", tries)
        self._patiently(lambda: self._write(item.output, file, fingerprint), "write", tries)
        size = {"width": edited.shape[1], "height": edited.shape[0], "bytes": len(file)}
        return {**kept, **size, "found": False, "seconds": round(time.monotonic() - started, 3)}

    def _read(self, uri: str) -> tuple[bytes, str]:
        if uri.startswith("data:"):
            return _inline(uri), ""
        if self.allowed and not any(uri.startswith(f"{place.rstrip('/')}/") for place in self.allowed):
            raise InputError(f"{uri} is not below {' or '.join(self.allowed)}, where this job may read")
        folder, name = _place(uri)
        return folder.read_versioned(name)

    def _request(self, item: Item, data: bytes, mask: bytes | None) -> EditRequest:
        settings = dataclasses.asdict(item.settings)
        del settings["output_format"]
        width, _, height = settings.pop("size").partition("x")
        return EditRequest(
            image=decode_picture(data, item.image[:200], self.max_pixels),
            instruction=item.instruction,
            mask=decode_mask(mask, item.mask[:200], self.max_pixels) if mask is not None else None,
            size=(int(width), int(height)) if width else None,
            batch=True,
            **{**settings, "seed": item.seed},
        )

    def _there(self, name: str) -> tuple[str, int] | None:
        """The fingerprint that the file ``name`` carries (empty: it is not one of ours) and its size, if it exists."""
        try:
            data = self.output.read(name)
        except StorageError as error:
            if error.kind != "missing":
                raise
            return None
        try:
            carried = json.loads(carried_text(data))["fingerprint"]
        except Exception:  # whatever somebody put there
            carried = ""
        return carried if isinstance(carried, str) else "", len(data)

    def _write(self, name: str, file: bytes, fingerprint: str) -> None:
        if self.output.write_if(name, file) is not None:
            return
        there = self._there(name)
        if there is not None and there[0] == fingerprint:
            return  # by an attempt whose answer was lost, or by another submission: the same bytes
        if there is not None and not there[0]:
            raise InputError(
                f"{name}: there is a file that is no output of a batch; choose another output, or remove it"
            )
        self.output.write(name, file)  # of an earlier request: other settings, another model, another picture

    # ---- trying again

    def _patiently(self, action: Callable[[], T], stage: str, tries: Tries) -> T:
        """``action``, again where its error may pass. Raises ItemFailedError where only this item cannot be done."""
        while not self._stopped.is_set():
            try:
                return self._through(action)
            except Exception as error:
                meaning = meaning_of(error, stage)
                if meaning == FATAL:
                    raise
                tries.count += 1
                if meaning == OWN or tries.count >= ATTEMPTS:
                    raise ItemFailedError(failure_of(error, stage), tries.count) from error
                self._through(lambda: note_attempt(self.output, tries.key, tries.count))
            self._stopped.wait(wait_s(tries.count))
        raise self._reason

    def _through(self, action: Callable[[], T]) -> T:
        return through_outages(action, self.outage_s, self._pause)

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise self._reason


@dataclass
class Tries:
    """How often an item has failed."""

    key: str
    count: int


def provenance(item: Item, model: str) -> dict[str, typing.Any]:
    """How the picture came about, for its metadata."""
    settings = {name: value for name, value in dataclasses.asdict(item.settings).items() if value not in (None, "")}
    return {"id": item.id, "instruction": item.instruction, **settings, "seed": item.seed, "model": model}


def _encoded(edited: np.ndarray, output_format: str, about: str) -> bytes:
    try:
        return encode_image(edited, output_format, about=about)
    except (ValueError, OSError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65535
        size = f"{edited.shape[1]} x {edited.shape[0]} pixels"
        raise InputError(f"a result of {size} cannot be written as {output_format} ({error})") from error


def _inline(uri: str) -> bytes:
    head, _, text = uri.partition(",")
    if not head.endswith(";base64"):
        raise PictureError("data: URLs must be ;base64", "format")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise PictureError(f"data: URL: not base64 ({error})") from error


def _place(uri: str) -> tuple[Folder, str]:
    if uri.startswith("s3://"):
        bucket, _, name = uri[5:].partition("/")
        return _bucket(f"s3://{bucket}"), name
    path = Path(uri)
    return open_folder(str(path.parent)), path.name


@functools.cache
def _bucket(uri: str) -> Folder:
    """One client a bucket; making one takes long and they may be shared by threads."""
    return open_folder(uri)
