"""The stage that turns a batch of captions into a batch of triplets (paper, section 3.1).

It asks the recipe's writer, applies the acceptance rules, asks again for the rows that were refused, and lets every
row out with a status and a reason. It holds no rule and no decoding of its own, and paints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ip2p.config import Recipe
from ip2p.errors import CheckpointError, WriterError
from ip2p.schema import Triplet
from ip2p.triplets.acceptance import NearDuplicates, Window, judge, judge_caption, judge_triplet
from ip2p.triplets.format import prompt_of

_TEXTS = ("prompt_id", "caption", "url", "instruction", "edited_caption", "task", "status", "reason", "error")


class Writer(Protocol):
    """What the stage needs of a writer; a row that failed for good comes back as its error."""

    def complete(
        self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]
    ) -> Sequence[str | WriterError]: ...


class WriteTriplets:
    """Ray Data's callable class: built once a worker, then called with batches.

    A batch is one unit of work: near duplicates are looked for within it, and a language model sees its rows together.
    Choose its rows by ``index``, never by what happens to be ready, and the result is the same on every run.

    ``writer`` and ``window`` (counts a text's tokens) replace what the recipe names. ``threads`` sets torch's threads;
    0 leaves them. Nothing is moderated here. Raises RecipeError, CheckpointError or WriterError when what the recipe
    names cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: str = "auto",
        threads: int = 0,
        *,
        writer: Writer | None = None,
        window: Window | None = None,
    ):
        self.recipe = recipe
        if threads > 0:
            import torch

            torch.set_num_threads(threads)
        self.window = window or text_window(recipe)
        self.given = recipe.triplets.writer == "given"
        self.writer = None if self.given else writer or _writer_of(recipe, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns in: index, prompt_id, caption, url, instruction, edited_caption (these two "" unless given).

        Columns out: the same with the texts filled in, and task, status, reason, error. Status "" means go on (its
        reason is ``ok``), "refused" that no triplet was accepted, "error" that the writer failed; ``reason`` is that of
        the last refusal. Rows keep their number and order, other columns pass through.
        """
        rows = [_row(batch, i) for i in range(len(batch["index"]))]
        by_index = sorted(rows, key=lambda row: row.index)
        if self.given:
            self._judge_given(by_index)
        else:
            self._write(by_index)
        texts = {name: np.array([getattr(row, name) for row in rows], dtype=object) for name in _TEXTS}
        return {**batch, **texts}

    def _judge_given(self, rows: list[_Row]) -> None:
        duplicates = NearDuplicates()
        for row in rows:
            triplet = Triplet(row.caption, row.instruction, row.edited_caption)
            row.settle(self._final_reason(triplet, judge_triplet(triplet, *self._limits()), duplicates))

    def _write(self, rows: list[_Row]) -> None:
        duplicates, pending = NearDuplicates(), []
        for row in rows:
            row.instruction = row.edited_caption = ""
            row.settle(judge_caption(row.caption, *self._limits()))
            if not row.status:
                pending.append(row)
        for attempt in range(self.recipe.triplets.tries):
            for row, completion in zip(pending, self._ask(pending, attempt), strict=True):
                self._judge_written(row, completion, duplicates)
            pending = [row for row in pending if row.status]

    def _ask(self, rows: list[_Row], attempt: int) -> Sequence[str | WriterError]:
        if not rows or self.writer is None:
            return []
        prompts = [prompt_of(row.caption) for row in rows]
        return self.writer.complete(prompts, [(row.prompt_id, attempt) for row in rows])

    def _judge_written(self, row: _Row, completion: str | WriterError, duplicates: NearDuplicates) -> None:
        if isinstance(completion, WriterError):
            row.settle("writer_failed", error=str(completion))
            return
        triplet, reason = judge(row.caption, completion, *self._limits())
        row.settle(self._final_reason(triplet, reason, duplicates))
        if triplet is not None and not row.status:
            row.instruction, row.edited_caption = triplet.instruction, triplet.edited_caption

    def _final_reason(self, triplet: Triplet | None, reason: str, duplicates: NearDuplicates) -> str:
        if triplet is not None and reason == "ok" and not duplicates.add(triplet.caption, triplet.instruction):
            return "near_duplicate"
        return reason

    def _limits(self) -> tuple[Window | None, int]:
        return self.window, self.recipe.triplets.text_window


@dataclass
class _Row:
    index: int
    prompt_id: str
    caption: str
    url: str
    instruction: str
    edited_caption: str
    task: str
    status: str = ""
    reason: str = ""
    error: str = ""

    def settle(self, reason: str, error: str = "") -> None:
        self.reason, self.error = reason, error
        self.status = "" if reason == "ok" else "error" if error else "refused"


def _row(batch: dict[str, np.ndarray], i: int) -> _Row:
    def text(name: str) -> str:
        value = batch[name][i] if name in batch else None
        return "" if value is None else str(value)

    names = ("prompt_id", "caption", "url", "instruction", "edited_caption", "task")
    return _Row(int(batch["index"][i]), **{name: text(name) for name in names})


def _writer_of(recipe: Recipe, device: str) -> Writer:
    if recipe.triplets.writer == "http":
        from ip2p.triplets.http_writer import HttpWriter

        return HttpWriter(recipe.triplets, recipe.seed)
    from ip2p.triplets.language_model import LanguageModelWriter

    return LanguageModelWriter(recipe.models.triplet_lm, recipe.triplets, recipe.seed, device)


def text_window(recipe: Recipe) -> Window:
    """Counts tokens as the recipe's text encoder does."""
    from ip2p.models.components import model_folder

    return clip_window(model_folder("text_to_image", recipe.models.text_to_image) / "tokenizer")


def clip_window(folder: Path) -> Window:
    """Counts tokens, BOS and EOS included, with the CLIP tokenizer in ``folder``; CheckpointError if it has none."""
    from transformers import CLIPTokenizer

    # Where its files are missing transformers makes an empty tokenizer and says nothing.
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no CLIP tokenizer here ({' and '.join(missing)} missing); fetch it again")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more particular for a broken file
        raise CheckpointError(f"{folder}: cannot load the CLIP tokenizer ({error}); fetch it again") from error
    return lambda text: len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
