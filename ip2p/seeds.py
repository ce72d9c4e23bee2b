"""Random choices from identity: the same row gives the same numbers on any worker, in any order, at any retry."""

from __future__ import annotations

import hashlib


def derive_seed(*identity: object) -> int:
    """A 63-bit seed from what a random choice belongs to, for example ``derive_seed(run_seed, prompt_id, k)``."""
    text = "\x1f".join(str(part) for part in identity)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stable_id(*identity: object) -> str:
    """A 16-hex-digit name for what ``identity`` says, the same on every machine."""
    text = "\x1f".join(str(part) for part in identity)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def unit_uniform(*identity: object) -> float:
    """A number in [0, 1) that belongs to ``identity``; 53 bits of it are random."""
    return (derive_seed(*identity) >> 10) / 2**53
