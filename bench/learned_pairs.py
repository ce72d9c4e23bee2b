#!/usr/bin/env python3
"""Too few pairs, or too little learned of them? Edits of pairs that were trained on, of others, and of drawings.

    python bench/learned_pairs.py --pairs out/run --model out/edit/model --task replace --count 120

Originals of pairs are edited by their own instructions; read, an edit should show what the pair's edited picture shows.
Where pairs that were trained on do no better than held-out ones, more pairs are not what is wanted. Drawings, whose
right answers are known, come from combinations of object, colour and style that training saw, and from held-out ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from ip2p.config import EMBEDDED
from ip2p.editing.editor import Editor
from ip2p.evaluation.edit_success import (
    OTHER_EXAM,
    EditExamples,
    by_instruction,
    examples_of,
    measure_edits,
    read_pictures,
)
from ip2p.images import decode_image
from ip2p.models.components import embedded_folder, load_edit_model
from ip2p.postcards.family.drawings import SIZE
from ip2p.postcards.grammar import TASKS
from ip2p.postcards.reader import CLASSES, AttributeReader, load_reader
from ip2p.seeds import derive_seed
from ip2p.training.pair_index import TRAINING_COLUMNS, Record, list_splits, read_shard_rows

Edit = Callable[..., Sequence[np.ndarray]]
"""``Editor.edit`` with all bound but pictures, instructions and seeds."""


def sampled(runs: Sequence[str], split: str, task: str, count: int) -> list[Record]:
    """``count`` pairs of ``split`` and ``task``, at random from all of ``runs``."""
    columns = (*TRAINING_COLUMNS, "task")
    rows = [row for shard in list_splits(runs)[split] for row in read_shard_rows(shard, columns) if row["task"] == task]
    order = np.random.default_rng(OTHER_EXAM).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def percent(values: Sequence[bool]) -> float:
    return round(100 * float(np.mean(values)), 1)


def of_pairs(pairs: Sequence[Record], edit: Edit, reader: AttributeReader) -> dict:
    """Percent of the edits that are read as the pair's edited picture is: in all, and by attribute."""
    originals, truths = (
        [decode_image(pair[f"{which}_image"]["bytes"]) for pair in pairs] for which in ("original", "edited")
    )
    seeds = [derive_seed("exam", 0, place) for place in range(len(pairs))]
    edited = edit(originals, [pair["instruction"] for pair in pairs], seed=seeds)
    wanted, found = read_pictures(reader, truths), read_pictures(reader, edited)
    both = list(zip(wanted, found, strict=True))
    alike = {name: percent([getattr(a, name) == getattr(b, name) for a, b in both]) for name in CLASSES}
    return {"edits": len(pairs), "all": percent([not set(a.differing(b)) for a, b in both]), **alike}


def of_drawings(held_out: bool, task: str, count: int, edit: EditExamples, reader: AttributeReader) -> dict:
    """Percent of the edits of drawings that are exact."""
    examples = [one for one in examples_of(len(TASKS) * count, OTHER_EXAM, held_out) if one.task == task]
    records = measure_edits(edit, examples, reader)
    return {"edits": len(records), "exact": percent([record["exact"] for record in records])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True, metavar="RUN", help="runs that the model was trained on")
    parser.add_argument("--model", default=EMBEDDED, help="edit model (default: the embedded one)")
    parser.add_argument("--task", choices=TASKS, default="replace", help="(default %(default)s)")
    parser.add_argument("--count", type=int, default=60, help="edits of each kind (default %(default)s)")
    args = parser.parse_args()
    model, reader = load_edit_model(args.model, device="cpu"), load_reader(embedded_folder("reader"))
    edit = partial(Editor(model).edit, steps=20, resolution=SIZE)
    for split, name in (("train", "pairs trained on"), ("val", "pairs held out")):
        pairs = sampled(args.pairs, split, args.task, args.count)
        if pairs:
            print(json.dumps({"of": name, **of_pairs(pairs, edit, reader)}), flush=True)
    for held_out, name in ((False, "drawings of seen combinations"), (True, "drawings of held-out combinations")):
        found = of_drawings(held_out, args.task, args.count, by_instruction(edit), reader)
        print(json.dumps({"of": name, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
