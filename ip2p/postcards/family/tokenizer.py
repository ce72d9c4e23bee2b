"""The family's own byte-pair vocabulary, in CLIP's file format: every word of the postcard grammar is one token.

Any other text still tokenises, down to single bytes. The window is CLIP's 77 tokens.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np

from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.grammar import sample_example

WINDOW = 77
START, END = "<|startoftext|>", "<|endoftext|>"
# Words that people use around an instruction; the grammar does not need them, its users might.
POLITE = (
    "please", "could", "you", "can", "i", "want", "would", "like", "now", "into", "over", "again", "more", "less",
    "very", "look", "looks", "looking", "transform", "convert", "edit", "change", "picture", "image", "scene", "sky",
    "ground", "style", "colour", "color", "with", "without", "but", "keep", "everything", "else", "same", "paint",
    "draw", "add", "remove", "replace", "make", "it", "a", "an", "the", "of", "in", "on", "at", "and", "to", "or",
    "is", "are", "be", "was", "were", "this", "that", "there", "here",
)  # fmt: skip


def byte_symbols() -> list[str]:
    """One printable character per byte, in CLIP's order: printable bytes first, the rest moved above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable]
    return symbols + [chr(256 + i) for i in range(256 - len(printable))]


def grammar_words(examples: int = 4000) -> Counter[str]:
    """How often each lower-case word occurs in ``examples`` captions and instructions."""
    words: Counter[str] = Counter(POLITE)
    for i in range(examples):
        rng = np.random.default_rng((7, i))
        example = sample_example(scene_of(7, i, held_out=None), rng)
        for text in (example.caption, example.instruction, example.edited_caption):
            words.update(text.replace(",", " , ").replace("-", " - ").lower().split())
    return words


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one symbol (ties by spelling)."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words if word.isalpha()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(symbols, best) for word, symbols in spelled.items()}


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_tokenizer(folder: Path) -> int:
    """Write ``vocab.json``, ``merges.txt`` and settings that transformers' CLIPTokenizer reads; returns the size."""
    symbols = byte_symbols()
    merges = learn_merges(grammar_words())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, "do_lower_case": True, "bos_token": START,
        "eos_token": END, "unk_token": END, "pad_token": END,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return len(tokens)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The three files that ``write_tokenizer`` made, byte for byte: a model must keep the one it was trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
