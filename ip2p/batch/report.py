"""What a batch leaves beside its pictures: results in the manifest's order, dead letters, a sheet to look at.

Everything is told from the manifest and the records, line by line, so a report can be written again at any time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from ip2p.batch.item import SETTINGS, Item
from ip2p.batch.manifest import Rejected, Source, entries
from ip2p.batch.openai_lines import answer_line
from ip2p.batch.places import ANSWERS, ERRORS, FAILED_LINES, REJECTED, RESULTS
from ip2p.batch.records import DONE, Record, Records
from ip2p.editing.before_after import draw_rows
from ip2p.errors import Ip2pError
from ip2p.pictures import decode_picture, read_picture
from ip2p.storage import Folder

SHOWN = 12
SAMPLED = 10_000

Line = tuple[Item | Rejected, Record | None]


def lines_of(source: Source, model: str, records: Records) -> Iterator[Line]:
    """Every line of the manifest with its record: None for a rejected line, and for one that nobody came to yet."""
    for entry in entries(source):
        yield entry, records.get(entry.key(model)) if isinstance(entry, Item) else None


def write_lines(folder: Folder, lines: Iterator[Line], openai: bool) -> None:
    """results.jsonl; failed.jsonl and rejected.jsonl where there are any; OpenAI's two files where asked for."""
    names = [RESULTS, FAILED_LINES, REJECTED, *([ANSWERS, ERRORS] if openai else [])]
    with ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile()) for name in names}
        for entry, record in lines:
            for name, line in _told(folder, entry, record, openai):
                files[name].write(line.encode() + b"\n")
        for name, file in files.items():
            if file.tell() or name in (RESULTS, ANSWERS):
                file.seek(0)
                folder.write_from(name, file)
            else:
                folder.delete(name)  # of a run that had some


def _told(folder: Folder, entry: Item | Rejected, record: Record | None, openai: bool) -> Iterator[tuple[str, str]]:
    """What ``entry`` adds to which file."""
    if isinstance(entry, Rejected):
        told = {"line": entry.line, "id": entry.id, "status": "rejected"}
        error = {"code": "invalid_request", "message": entry.message, "stage": "manifest"}
        yield RESULTS, json.dumps({**told, "error": error})
        yield REJECTED, json.dumps({"line": entry.line, "id": entry.id, "message": entry.message})
        record = {"key": f"line-{entry.line}", "id": entry.id, "error": error}
    elif record is None:
        yield RESULTS, json.dumps({"line": entry.line, "id": entry.id, "status": "waiting"})
        return
    else:
        yield RESULTS, json.dumps({**record, "line": entry.line})
        if record["status"] == DONE:
            if openai:
                yield ANSWERS, answer_line(record, folder.read(entry.output))
            return
        yield FAILED_LINES, json.dumps({**row_of(entry), "error": record["error"], "attempts": record["attempts"]})
    if openai:
        yield ERRORS, answer_line(record, None)


def row_of(item: Item) -> dict[str, typing.Any]:
    """The manifest row that asks for exactly ``item``."""
    settings = {name: getattr(item.settings, name) for name in SETTINGS}
    fields = {"id": item.id, "image": item.image, "instruction": item.instruction, "output": item.output}
    more = {"mask": item.mask, "version": item.version, **settings}
    return {**fields, **{name: value for name, value in more.items() if value not in (None, "")}}


class Durations:
    """A fair sample of seconds, of bounded size."""

    def __init__(self, seed: int = 0):
        self.seconds: list[float] = []
        self.count = 0
        self._random = random.Random(seed)

    def add(self, seconds: Sequence[float]) -> None:
        for one in seconds:
            self.count += 1
            if len(self.seconds) < SAMPLED:
                self.seconds.append(one)
            elif (place := self._random.randrange(self.count)) < SAMPLED:
                self.seconds[place] = one

    def percentile(self, share: float) -> float | None:
        return round(float(np.quantile(self.seconds, share)), 3) if self.seconds else None


@dataclasses.dataclass
class Usage:
    """What this run of the job used."""

    seconds: float = 0.0
    device_seconds: float = 0.0  # of all actors, from when each was ready to its end
    row_evals: int = 0

    def cost(self, price_per_hour: float) -> float:
        return round(self.device_seconds / 3600 * price_per_hour, 4)


def contact_sheet(folder: Folder, lines: Iterator[Line]) -> bytes | None:
    """PNG of the first SHOWN edits beside their originals; None where there is none."""
    done = (entry for entry, record in lines if isinstance(entry, Item) and record and record["status"] == DONE)
    shown: list[tuple[tuple[np.ndarray, np.ndarray], str]] = []
    for item in itertools.islice(done, 2 * SHOWN):
        if len(shown) < SHOWN and not item.image.startswith("data:"):
            pair = _quietly(lambda item=item: _pair(folder, item))  # type: ignore[misc]
            shown += [(pair, item.instruction)] if pair is not None else []
    if not shown:
        return None
    return draw_rows([pair for pair, _ in shown], [text for _, text in shown])


def _pair(folder: Folder, item: Item) -> tuple[np.ndarray, np.ndarray]:
    return read_picture(item.image), decode_picture(folder.read(item.output), item.output)


def _quietly(action: Callable[[], typing.Any]) -> typing.Any:
    """A sheet to look at is no reason to fail: its pictures may be gone by now."""
    try:
        return action()
    except Ip2pError:
        return None
