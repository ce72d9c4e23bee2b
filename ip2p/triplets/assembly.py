"""From a run's recipe to the stage that writes its triplets: writer, text window and judge."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ip2p.config import EMBEDDED, Recipe, Triplets
from ip2p.storage import Folder
from ip2p.triplets.acceptance import Window
from ip2p.triplets.answers import Answer, Answers
from ip2p.triplets.budget import Budget, Pace, Prices
from ip2p.triplets.format import chat_messages
from ip2p.triplets.judge import MAX_TOKENS, Judge, Question, question_messages
from ip2p.triplets.stage import Writer, text_window
from ip2p.triplets.writing import WriteRequests, Writing, WritingRun
from ip2p.triplets.written import cost_so_far


@dataclass(frozen=True)
class Pacing:
    """How fast and how dear a server may be asked; decides nothing about what is written."""

    max_cost: float = math.inf  # of the whole run, earlier starts included, in the unit of the prices
    requests_per_minute: float = 0.0  # 0: as fast as answers come
    concurrency: int = 8  # requests under way at a time
    timeout_s: float = 60.0


def default_writing(recipe: Recipe) -> Writing:
    """The embedded writer knows the postcards' types of edits, others the ten of open-ended captions."""
    return Writing(types="postcard" if recipe.models.triplet_lm == EMBEDDED else "open")


def language_model_stage(run: WritingRun, device: str, writer: Writer | None = None) -> WriteRequests:
    """The stage with the language model that ``run`` names, or with ``writer``."""
    from ip2p.triplets.language_model import LanguageModelWriter

    recipe = run.recipe
    writer = writer or LanguageModelWriter(recipe.models.triplet_lm, recipe.triplets, recipe.seed, device)
    judge = _language_model_judge(run, device, writer) if run.writing.judge else None
    return WriteRequests(run, writer, _window_of(recipe), judge)


def http_stage(run: WritingRun, pacing: Pacing, folder: Folder) -> WriteRequests:
    """The stage with a server behind it. Money that ``folder`` says is spent counts."""
    from ip2p.triplets.http_writer import HttpWriter

    recipe, writing = run.recipe, run.writing
    shared: dict[str, Any] = {
        "timeout_s": pacing.timeout_s, "concurrency": pacing.concurrency, "pace": Pace(pacing.requests_per_minute),
        "prices": Prices(writing.prompt_price, writing.completion_price), "answers": Answers(folder),
        "budget": Budget(pacing.max_cost, cost_so_far(folder)),
    }  # fmt: skip
    writer = HttpWriter(
        recipe.triplets, recipe.seed, messages=chat_messages if writing.http_chat else None, **shared
    )  # fmt: skip
    if not writing.judge:
        return WriteRequests(run, writer, _window_of(recipe), None, writer.usage)
    asker = HttpWriter(
        _brief(recipe.triplets), recipe.seed, messages=question_messages if writing.http_chat else None, **shared
    )  # fmt: skip

    def usage(identity: tuple[object, ...]) -> Answer:
        written, judged = writer.usage(identity), asker.usage((*identity, "judge"))
        return Answer(
            written.text, written.prompt_tokens + judged.prompt_tokens,
            written.completion_tokens + judged.completion_tokens, written.cost + judged.cost,
        )  # fmt: skip

    return WriteRequests(run, writer, _window_of(recipe), Judge(asker), usage)


def _window_of(recipe: Recipe) -> Window:
    """Counts tokens as the recipe's text encoder does, or as published CLIP models do where it names none."""
    from ip2p.triplets.seed import published_clip_window

    return text_window(recipe) if recipe.models.text_to_image else published_clip_window()


def _language_model_judge(run: WritingRun, device: str, writer: Writer) -> Judge:
    from ip2p.triplets.language_model import LanguageModelWriter

    brief, seed = _brief(run.recipe.triplets), run.recipe.seed
    if run.writing.judge == "lm" and isinstance(writer, LanguageModelWriter):
        return Judge(LanguageModelWriter.around(writer.model, writer.tokenizer, Question(), brief, seed))
    folder = run.recipe.models.triplet_lm if run.writing.judge == "lm" else run.writing.judge
    return Judge(LanguageModelWriter(folder, brief, seed, device, manner=Question()))


def _brief(triplets: Triplets) -> Triplets:
    return dataclasses.replace(triplets, temperature=0.0, max_tokens=MAX_TOKENS)
