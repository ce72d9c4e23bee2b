"""The triplets that a language model learns its task from, and what is checked about them (paper, section 3.1).

``seed.jsonl`` beside this file was written row by row, one object a line with ``caption``, ``instruction``,
``edited_caption`` and ``task``; docs/seed_triplets.md says how. ``python -m ip2p.triplets.seed [FILE]`` counts and
checks such a file, also one of your own.

The checks compare words, not meaning: they find slips of the pen. Whether an edit makes sense they cannot tell.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ip2p.errors import InputError
from ip2p.row_files import Row, Wanted, read_rows
from ip2p.schema import Triplet
from ip2p.triplets.acceptance import NearDuplicates, Window, judge, normalised
from ip2p.triplets.consistency import inconsistencies
from ip2p.triplets.format import completion_of
from ip2p.triplets.tasks import TASKS

SEED_FILE = Path(__file__).resolve().with_name("seed.jsonl")
TOKEN_LIMIT = 77
"""CLIP's window, BOS and EOS included."""

FIELDS = ("caption", "instruction", "edited_caption", "task")
PROBLEM_KINDS = (
    "unreadable",  # the line is not a JSON object
    "fields",  # a field is missing, is not text, or is not one of FIELDS
    "untidy",  # a line break, or a space too many
    "task",  # not one of TASKS
    "unparseable", "empty", "unchanged", "too_long", "near_duplicate",  # what acceptance would refuse a writer for
    "caption_again",  # the same caption, case and punctuation aside
    "similar_caption",  # nearly the same words as another caption
    "instruction_again",  # used more than MAX_INSTRUCTION_USES times
    "not_shown",  # what the instruction asks for cannot be seen in the edited caption
    "rewritten",  # hardly a word of the caption is left
    "unasked",  # the edited caption says more than the caption and the instruction
    "share",  # a type has far more or fewer rows than an even share
)  # fmt: skip

MAX_INSTRUCTION_USES = 3
SIMILAR_JACCARD = 0.7
SHARE_TOLERANCE = 0.2


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a file: the 1-based line (0: the whole file), one of PROBLEM_KINDS, and a sentence."""

    line: int
    kind: str
    message: str


def load_seeds(uri: str = str(SEED_FILE)) -> list[Triplet]:
    """The triplets of ``uri`` in its order, each with its task.

    Raises InputError for a file without rows or with a row that is not a whole triplet; it does not check more than
    that, see ``find_problems``. Raises StorageError if the file cannot be read.
    """
    rows, problems = _read(uri)
    if problems:
        raise InputError(f"{uri}: line {problems[0].line}: {problems[0].message}")
    if not rows:
        raise InputError(f"{uri}: the file is empty; it needs one object a line with {', '.join(FIELDS)}")
    return [triplet for _, triplet in rows]


def task_counts(triplets: Sequence[Triplet]) -> dict[str, int]:
    """How many triplets there are of each of TASKS, in their order; others are not counted."""
    counts = Counter(triplet.task for triplet in triplets)
    return {task: counts[task] for task in TASKS}


def find_problems(uri: str = str(SEED_FILE), window: Window | None = None) -> list[Problem]:
    """All that is wrong with the file, by line; an empty list is a clean file.

    ``window`` counts tokens (``published_clip_window()``); None leaves lengths unchecked. Of rows that are too much
    alike the later one is named. Raises StorageError if the file cannot be read.
    """
    rows, problems = _read(uri)
    for line, triplet in rows:
        problems += [Problem(line, *found) for found in _problems_of(triplet, window)]
    for check in (_repeated, _similar, _refused_as_near_duplicates, _uneven):
        problems += check(rows)
    return sorted(problems, key=lambda problem: problem.line)


def published_clip_window() -> Window:
    """Counts tokens as the published CLIP models do, whose 49,408 pieces open_clip brings along.

    The tokenizer of the shipped postcard family is of no use here: it knows few words and spells the others.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return lambda text: len(tokenizer.encode(text)) + 2


_Rows = list[tuple[int, Triplet]]  # with their lines


def _read(uri: str) -> tuple[_Rows, list[Problem]]:
    rows: _Rows = []
    problems = []
    for row in read_rows(uri, Wanted()):
        message = row.problem or _wrong_fields(row)
        if message:
            problems.append(Problem(row.line, "unreadable" if row.problem else "fields", message))
        else:
            rows.append((row.line, Triplet(**{name: str(row.values[name]) for name in FIELDS})))
    return rows, problems


def _wrong_fields(row: Row) -> str:
    for name in FIELDS:
        if not isinstance(row.values.get(name), str):
            return f"{name} is not text" if name in row.values else f"no {name}"
    unknown = [name for name in row.values if name not in FIELDS]
    return f"unknown field {unknown[0]!r}" if unknown else ""


def _problems_of(triplet: Triplet, window: Window | None) -> Iterator[tuple[str, str]]:
    texts = (triplet.caption, triplet.instruction, triplet.edited_caption)
    if any(text != " ".join(text.split()) for text in texts):
        yield "untidy", "a text holds a line break or a space too many"
    if triplet.task not in TASKS:
        yield "task", f"unknown task {triplet.task!r}; use one of {', '.join(TASKS)}"
    # Through the text format and back, since that is how a model will meet it.
    _, reason = judge(triplet.caption, completion_of(triplet), window, TOKEN_LIMIT)
    if reason != "ok":
        yield reason, f"the acceptance rules say {reason}"
        return
    yield from inconsistencies(triplet)


def _repeated(rows: _Rows) -> Iterator[Problem]:
    captions: dict[str, int] = {}
    uses: Counter[str] = Counter()
    for line, triplet in rows:
        first = captions.setdefault(normalised(triplet.caption), line)
        if first != line:
            yield Problem(line, "caption_again", f"the caption of line {first}")
        instruction = normalised(triplet.instruction)
        uses[instruction] += 1
        if uses[instruction] > MAX_INSTRUCTION_USES:
            yield Problem(line, "instruction_again", f"the instruction is used for the {uses[instruction]}th time")


def _similar(rows: _Rows) -> Iterator[Problem]:
    captions = [(line, normalised(triplet.caption)) for line, triplet in rows]
    bags = [(line, text, frozenset(text.split())) for line, text in captions]
    for (first, text, a), (line, other, b) in itertools.combinations(bags, 2):
        if text != other and len(a & b) >= SIMILAR_JACCARD * len(a | b):
            yield Problem(line, "similar_caption", f"nearly the words of line {first}")


def _refused_as_near_duplicates(rows: _Rows) -> Iterator[Problem]:
    duplicates = NearDuplicates()
    for line, triplet in rows:
        if not duplicates.add(triplet.caption, triplet.instruction):
            yield Problem(line, "near_duplicate", "the same edit of nearly the same caption came before")


def _uneven(rows: _Rows) -> Iterator[Problem]:
    even = len(rows) / len(TASKS)
    for task, count in task_counts([triplet for _, triplet in rows]).items():
        if abs(count - even) > SHARE_TOLERANCE * even:
            yield Problem(0, "share", f"{count} rows of {task}, an even share is {even:.0f}")


def main(arguments: Sequence[str], say: Callable[[str], object] = print) -> int:
    """Counts and problems of one file (by default the shipped one), for people; 1 if there is a problem."""
    uri = arguments[0] if arguments else str(SEED_FILE)
    problems = find_problems(uri, published_clip_window())
    for problem in problems:
        say(f"line {problem.line}: {problem.kind}: {problem.message}")
    counts = task_counts([triplet for _, triplet in _read(uri)[0]])
    say(f"{sum(counts.values())} triplets: " + ", ".join(f"{count} {task}" for task, count in counts.items()))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
