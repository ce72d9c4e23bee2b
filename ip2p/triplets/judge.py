"""A second language model, or the same, that reads a triplet and says whether the edit follows (optional).

It is asked through the interface that writers have, at temperature 0, and its verdict is a column: what to do with it
is for whoever uses the triplets. A small model's verdict is worth little; measure it on the seeds before trusting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ip2p.errors import WriterError
from ip2p.schema import Triplet
from ip2p.triplets.stage import Writer

VERDICTS = ("yes", "no", "unclear", "error")
MAX_TOKENS = 8

_QUESTION = """Caption of a picture: {caption}
Instruction for an edit: {instruction}
Caption of the edited picture: {edited_caption}
Does the second caption describe the first picture after exactly this edit? Answer yes or no."""


class Judge:
    """Gives one of VERDICTS for each triplet; ``writer`` answers what ``question_of`` asks."""

    def __init__(self, writer: Writer):
        self.writer = writer

    def verdicts(self, triplets: Sequence[Triplet], identities: Sequence[tuple[object, ...]]) -> list[str]:
        if not triplets:
            return []
        questions = [question_of(triplet) for triplet in triplets]
        answers = self.writer.complete(questions, [(*identity, "judge") for identity in identities])
        return [verdict_of(answer) for answer in answers]


class Question:
    """How a judge's question becomes tokens: by the chat template where there is one (``language_model.Asking``)."""

    tasks = False

    def token_ids(self, tokenizer: Any, prompt: str) -> list[int]:
        if tokenizer.chat_template is None:
            return list(tokenizer(prompt + "\nAnswer:", verbose=False)["input_ids"])
        text = tokenizer.apply_chat_template(question_messages(prompt), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def question_of(triplet: Triplet) -> str:
    return _QUESTION.format(
        caption=triplet.caption, instruction=triplet.instruction, edited_caption=triplet.edited_caption
    )


def question_messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def verdict_of(answer: str | WriterError) -> str:
    """yes or no if the answer begins so, error where there is none, else unclear."""
    if isinstance(answer, WriterError):
        return "error"
    words = answer.strip().lower().split()
    first = words[0].strip(".,!:;*\"'") if words else ""
    return first if first in ("yes", "no") else "unclear"
