"""Stats of a thousand shards in one file, so that taking up a run of many shards costs a read a thousand, not one each.

A block is a thousand shards that follow each other in the plan; its file appears when all of them are finished, and is
a copy: each shard's own stats stay and remain its commit mark. The last, incomplete thousand has no block, so a block
never changes when captions are appended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ip2p.dataset.shards import Shard, ShardStats, read_stats
from ip2p.errors import StorageError
from ip2p.seeds import stable_id
from ip2p.storage import Folder

SHARDS_PER_BLOCK = 1000


class StatsBlocks:
    """Reads the stats of finished shards of ``plan``, and writes each block once all of its shards have been seen."""

    def __init__(self, plan: Sequence[Shard], folder: Folder, size: int = SHARDS_PER_BLOCK):
        names = [shard.name for shard in plan]
        self.folder = folder
        self.blocks = [names[start : start + size] for start in range(0, len(names) - size + 1, size)]
        self.block_of = {name: number for number, block in enumerate(self.blocks) for name in block}
        self.seen: dict[int, dict[str, ShardStats]] = {}
        self.written = set(folder.list("blocks/"))

    def read(self, done: Sequence[str]) -> Iterator[ShardStats]:
        """The stats of the finished shards ``done``, in any order; blocks that are missing are written.

        A block with a shard that is not finished any more goes: made again, that shard may have other hashes.
        """
        finished = set(done)
        for block in self.blocks:
            if not finished >= set(block):
                self.forget(block[0])
        numbers = [number for number in range(len(self.blocks)) if self._file(number) in self.written]
        with ThreadPoolExecutor(16) as readers:
            for number, stats in zip(numbers, readers.map(self._read_block, numbers), strict=True):
                finished -= set(self.blocks[number]) if stats else set()
                yield from stats.values()
        for one in read_stats(self.folder, [name for name in done if name in finished]):
            self.add(one)
            yield one

    def add(self, stats: ShardStats) -> None:
        """A shard is finished. Writes its block if it was the last of it."""
        number = self.block_of.get(stats.name)
        if number is None or self._file(number) in self.written:
            return
        seen = self.seen.setdefault(number, {})
        seen[stats.name] = stats
        if len(seen) == len(self.blocks[number]):
            content = {name: seen[name].__dict__ for name in self.blocks[number]}
            self.folder.write(self._file(number), (json.dumps(content, sort_keys=True) + "\n").encode())
            self.written.add(self._file(number))
            del self.seen[number]

    def forget(self, name: str) -> None:
        """A shard is to be made again: its block no longer holds, and comes back at the next start."""
        number = self.block_of.get(name)
        if number is None:
            return
        self.seen.get(number, {}).pop(name, None)
        if self._file(number) in self.written:
            self.folder.delete(self._file(number))
            self.written.remove(self._file(number))

    def _file(self, number: int) -> str:
        """Named after its shards, so that a block of other shards is never taken for it."""
        return f"blocks/part-{number:05d}-{stable_id(*self.blocks[number])[:8]}.json"

    def _read_block(self, number: int) -> dict[str, ShardStats]:
        """Nothing where the file cannot be used: it is only a copy, and is made again."""
        try:
            content = json.loads(self.folder.read(self._file(number)))
            return {name: ShardStats(**content[name]) for name in self.blocks[number]}
        except (StorageError, ValueError, KeyError, TypeError):
            self.written.discard(self._file(number))
            return {}
