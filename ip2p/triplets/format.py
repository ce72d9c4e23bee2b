"""The text format between a caption and the language model that writes its edit (paper, section 3.1).

A prompt is a caption and a delimiter; a completion is an instruction, a delimiter, the edited caption and a stop mark.
The marks are those of the original, so that models and files made for it can be used as they are. One is added for
models that write an edit of a wanted type: a line with the type before the prompt's delimiter. This file neither
samples text nor decides whether a triplet is good enough.
"""

from __future__ import annotations

from ip2p.schema import Triplet

DELIMITER_0 = "\n##\n"
"""Ends the caption in a prompt."""
TASK_MARK = "\n@@\n"
"""Stands between caption and edit type in a prompt that asks for one; the original knows no types."""
DELIMITER_1 = "\n%%\n"
"""Stands between instruction and edited caption in a completion."""
STOP = "\nEND"
"""Ends a completion."""

CHAT_TASK = (
    "You think of an edit of a picture. Given its caption, write an instruction for the edit, a line with %%, the "
    "caption of the edited picture (the same words but for the edit), and a line with END. Nothing else."
)
"""What a chat model is told; models fine-tuned with a chat template have learnt with these very words."""


def prompt_of(caption: str, task: str = "") -> str:
    """What the language model is asked to continue; without a ``task`` it is the original's prompt."""
    return caption + (TASK_MARK + task if task else "") + DELIMITER_0


def split_prompt(prompt: str) -> tuple[str, str]:
    """Caption and task (or "") of what ``prompt_of`` made."""
    caption, _, task = prompt.removesuffix(DELIMITER_0).partition(TASK_MARK)
    return caption, task


def chat_messages(prompt: str) -> list[dict[str, str]]:
    """The same prompt in words, for models that are asked by a chat template."""
    caption, task = split_prompt(prompt)
    wanted = f"Type of edit: {task}\n" if task else ""
    return [
        {"role": "system", "content": CHAT_TASK},
        {"role": "user", "content": f"{wanted}Caption: {caption}"},
    ]


def completion_of(triplet: Triplet) -> str:
    """The continuation that a fine-tuned model should write for ``prompt_of(triplet.caption)``."""
    return triplet.instruction + DELIMITER_1 + triplet.edited_caption + STOP


def until_stop(text: str) -> str:
    """``text`` up to the first stop mark, or all of it."""
    return text.partition(STOP)[0]


def parse_completion(text: str) -> tuple[str, str] | None:
    """Instruction and edited caption, stripped; None unless the text before STOP has exactly these two parts.

    The format cannot hold an edited caption that begins with ``END``: with the delimiter's line break that is STOP.
    """
    parts = until_stop(text).split(DELIMITER_1)
    if len(parts) != 2:
        return None
    return parts[0].strip(), parts[1].strip()
