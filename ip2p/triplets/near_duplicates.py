"""Near duplicates in a whole run, by MinHash (datasketch): the same instruction for nearly the same caption.

``acceptance.NearDuplicates`` compares with every earlier triplet of one unit of work; this looks among millions. Two
captions under one instruction are near when the Jaccard index of their words, estimated from 128 permutations, is at
least the threshold. Offered in the rows' order, the first of each group stays, on every run.
"""

from __future__ import annotations

from typing import Any

from ip2p.triplets.acceptance import normalised

PERMUTATIONS = 128


class MinHashDuplicates:
    """Remembers the triplets that were not near an earlier one."""

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        # Its copies share the permutations; with its own each would take three times the bytes and most of the time.
        self._empty = MinHash(num_perm=PERMUTATIONS)
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._kept: list[Any] = []

    def add(self, caption: str, instruction: str) -> bool:
        """Remember this triplet and return True, or return False if it nearly repeats one already here."""
        asked = normalised(instruction)
        sketch = self._empty.copy()
        # Tied to the instruction, since in a long caption one word hardly counts, while red and blue are two edits.
        sketch.update_batch([f"{asked}\x1f{word}".encode() for word in sorted(set(normalised(caption).split()))])
        if any(sketch.jaccard(self._kept[place]) >= self.threshold for place in self._index.query(sketch)):
            return False
        self._index.insert(len(self._kept), sketch)
        self._kept.append(sketch)
        return True
