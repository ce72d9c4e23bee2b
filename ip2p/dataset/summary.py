"""What a run came to, in numbers: ``summary.json``, summed from the shards' stats."""

from __future__ import annotations

import collections
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ip2p.dataset.manifest import FileEntry
from ip2p.dataset.shards import Shard, ShardStats, unfinished
from ip2p.dataset.stats_blocks import StatsBlocks
from ip2p.storage import Folder


@dataclass
class Totals:
    """Running sums over shards; ``files`` collects the manifest."""

    prompts: int = 0
    candidates: int = 0
    kept_pairs: int = 0
    row_evals: int = 0
    prompts_by_reason: collections.Counter[str] = field(default_factory=collections.Counter)
    candidates_by_reason: collections.Counter[str] = field(default_factory=collections.Counter)
    files: dict[str, FileEntry] = field(default_factory=dict)

    def add(self, stats: ShardStats) -> None:
        self.prompts += stats.prompts
        self.candidates += stats.candidates
        self.kept_pairs += stats.kept_pairs
        self.row_evals += stats.row_evals
        self.prompts_by_reason.update(stats.prompts_by_reason)
        self.candidates_by_reason.update(stats.candidates_by_reason)
        self.files.update(stats.files)


class TakenUp(typing.NamedTuple):
    """Where a run stands: what is done, summed; what is left, in order; and where to note what gets done now."""

    totals: Totals
    todo: list[Shard]
    blocks: StatsBlocks

    def add(self, stats: ShardStats) -> None:
        """A shard of ``todo`` has been finished."""
        self.totals.add(stats)
        self.blocks.add(stats)


def take_up(
    plan: Sequence[Shard],
    folder: Folder,
    retry_errors: bool = False,
    redo_changed: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> TakenUp:
    """Read off ``folder`` what it holds of ``plan``.

    With ``retry_errors`` shards that hold a prompt with an error are left to do too. What became of shards of other
    captions, ``redo_changed``, ``say`` and InputError are those of ``unfinished``.
    """
    left = {shard.name for shard in unfinished(plan, folder, redo_changed, say)}
    totals, blocks = Totals(), StatsBlocks(plan, folder)
    for stats in blocks.read([shard.name for shard in plan if shard.name not in left]):
        if retry_errors and stats.failed:
            left.add(stats.name)
            blocks.forget(stats.name)
        else:
            totals.add(stats)
    return TakenUp(totals, [shard for shard in plan if shard.name in left], blocks)


def summary_of(totals: Totals, bad_rows: int, seconds: float) -> dict[str, typing.Any]:
    """``seconds`` is this invocation's wall time; everything else covers the whole run folder."""
    kept = totals.kept_pairs
    return {
        "prompts": totals.prompts,
        "candidates": totals.candidates,
        "kept_pairs": kept,
        "row_evals": totals.row_evals,
        "row_evals_per_kept_pair": round(totals.row_evals / kept, 1) if kept else None,
        "pass_share": round(1 - _failed(totals) / totals.candidates, 4) if totals.candidates else None,
        "prompts_by_reason": dict(sorted(totals.prompts_by_reason.items())),
        "kept_by_reason": dict(sorted(totals.candidates_by_reason.items())),
        "bad_input_rows": bad_rows,
        "seconds": round(seconds, 1),
    }


def _failed(totals: Totals) -> int:
    passed = ("kept", "over_max_kept")
    return sum(count for reason, count in totals.candidates_by_reason.items() if reason not in passed)


def summary_bytes(summary: dict[str, typing.Any]) -> bytes:
    return (json.dumps(summary, indent=1) + "\n").encode()
