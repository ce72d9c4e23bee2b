"""Shares of edit types: which type to ask for in each request, and what to leave out so that the shares hold.

A writer that knows types is asked for them in turn; one that does not is asked for more than is needed, and types that
came too often are cut. Both depend on the rows' order alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ip2p.errors import RecipeError

CYCLE = 1000
"""Requests after which the asked types come round; shares are exact to a thousandth."""


def parse_shares(text: str, types: Sequence[str]) -> dict[str, float]:
    """``add=2,remove=1`` as shares that sum to 1; ``even`` is every type alike, "" none. RecipeError for others."""
    if not text:
        return {}
    if text == "even":
        return {task: 1 / len(types) for task in types}
    shares: dict[str, float] = {}
    for part in text.split(","):
        task, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            shares[task] = float(weight)
        except ValueError:
            raise RecipeError(f"writing.shares wants even, or type=weight pairs with commas, got {part!r}") from None
        if task not in types:
            raise RecipeError(f"writing.shares: unknown type {task!r}; known: {', '.join(types)}")
        if not 0 < shares[task] < math.inf:
            raise RecipeError(f"writing.shares: the weight of {task} must be above 0; leave out what is not wanted")
    total = sum(shares.values())
    return {task: weight / total for task, weight in shares.items()}


def asked_types(shares: Mapping[str, float]) -> list[str]:
    """The cycle of types to ask for: each as often as its share says, spread evenly."""
    exact = {task: share * CYCLE for task, share in shares.items()}
    counts = {task: int(count) for task, count in exact.items()}
    by_rest = sorted(exact, key=lambda task: counts[task] - exact[task])
    for task in by_rest[: CYCLE - sum(counts.values())]:
        counts[task] += 1
    turns = [((turn + 0.5) / count, task) for task, count in counts.items() for turn in range(count)]
    return [task for _, task in sorted(turns)]


def within_shares(tasks: Sequence[str], shares: Mapping[str, float], tolerance: float) -> list[bool]:
    """For each row, whether it stays: as many as possible do while no type's share is off by more than ``tolerance``.

    Of a type that is cut the first rows stay. Types without a share go. Where a wanted type never came, or so few rows
    that no choice would make the shares hold, no wanted type is cut.
    """
    there = Counter(task for task in tasks if task in shares)
    if len(there) < len(shares):
        return [task in shares for task in tasks]
    limits = _limits(there, shares, tolerance)
    seen: Counter[str] = Counter()
    stays = []
    for task in tasks:
        seen[task] += 1
        stays.append(seen[task] <= limits.get(task, 0))
    return stays


def _limits(there: Mapping[str, int], shares: Mapping[str, float], tolerance: float) -> dict[str, int]:
    """How many of each type stay, for the largest total that the tolerance allows."""
    for total in range(sum(there.values()), 0, -1):
        least = {task: math.ceil((1 - tolerance) * share * total) for task, share in shares.items()}
        most = {task: min(there[task], math.floor((1 + tolerance) * share * total)) for task, share in shares.items()}
        if sum(most.values()) >= total and all(least[task] <= most[task] for task in shares):
            break
    else:
        return dict(there)  # so few rows that no choice comes near the shares
    limits = {task: min(most[task], max(least[task], int(share * total))) for task, share in shares.items()}
    for task in shares:
        limits[task] += max(0, min(most[task] - limits[task], total - sum(limits.values())))
    return limits
