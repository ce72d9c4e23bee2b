"""What a paid server has answered and no finished part holds yet: one small file an answer, so that a run that is
killed pays for none of them twice.

A file is written before a request is sent (with what it may cost) and replaced when the answer is there. A file
without an answer is a request whose fate nobody knows: it is asked again, and what it may have cost counts as spent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from ip2p.storage import Folder

PREFIX = "answers/"


@dataclass(frozen=True)
class Answer:
    """``text`` None: not answered, or not in a form that could be read. Tokens as the server counted them."""

    text: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Answers:
    """The answers in ``folder``; an identity is ``(prompt_id, ...)``."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def get(self, identity: Sequence[object]) -> Answer | None:
        """What is known of a request, if it was ever begun."""
        name = _name(identity)
        return Answer(**json.loads(self.folder.read(name))) if self.folder.exists(name) else None

    def put(self, identity: Sequence[object], answer: Answer) -> None:
        self.folder.write(_name(identity), json.dumps(asdict(answer)).encode())

    def forget(self, identities: Sequence[Sequence[object]]) -> None:
        """Finished parts hold these now, or nothing was paid for them."""
        for identity in identities:
            if self.folder.exists(_name(identity)):
                self.folder.delete(_name(identity))

    def forget_all_of(self, finished: Callable[[str], bool]) -> None:
        """Remove what a run left that was killed between a part and its clearing up, by prompt_id."""
        for name in self.folder.list(PREFIX):
            if finished(_prompt_id(name)):
                self.folder.delete(name)

    def cost(self, finished: Callable[[str], bool] = lambda prompt_id: False) -> float:
        """The sum of all that is here, without what a kill left of ``finished`` captions: their rows say it too."""
        names = [name for name in self.folder.list(PREFIX) if not finished(_prompt_id(name))]
        with ThreadPoolExecutor(16) as readers:
            return sum(json.loads(data)["cost"] for data in readers.map(self.folder.read, names))


def _name(identity: Sequence[object]) -> str:
    return PREFIX + "-".join(map(str, identity)) + ".json"


def _prompt_id(name: str) -> str:
    return name.removeprefix(PREFIX).partition("-")[0]
