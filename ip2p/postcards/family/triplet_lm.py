"""The family's triplet writer: a GPT-2 of about a million parameters that has read only postcard edits.

It learns from the grammar's own (caption, instruction, edited caption), in the original's delimiters, with the loss
on the completion alone; the tasks come in equal shares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ip2p.postcards.family.drawings import scene_of
from ip2p.postcards.family.fitting import Schedule, fit
from ip2p.postcards.grammar import TASKS, EditExample, sample_example
from ip2p.schema import Triplet
from ip2p.triplets.format import completion_of, prompt_of

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

MAX_TOKENS = 160
PAD = "<|pad|>"


def example_of(index: int, held_out: bool | None = False) -> EditExample:
    """Training example ``index``: tasks in turn, so that each has the same share."""
    rng = np.random.default_rng((5, index))
    task = TASKS[index % len(TASKS)]
    scene = scene_of(5, index, held_out)
    while task == "remove" and not scene.extras:
        index += 1_000_000_007
        scene = scene_of(5, index, held_out)
    return sample_example(scene, rng, task)


def text_of(example: EditExample) -> tuple[str, str]:
    """Prompt and completion in the original's format."""
    triplet = Triplet(example.caption, example.instruction, example.edited_caption)
    return prompt_of(triplet.caption), completion_of(triplet)


def write_lm_tokenizer(folder: Path, examples: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the grammar, saved for AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(("".join(text_of(example_of(i, None))) for i in range(examples)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=PAD, model_max_length=MAX_TOKENS, padding_side="left"
    )
    fast.save_pretrained(folder)
    return fast


def new_triplet_lm(vocabulary: int, pad: int) -> GPT2LMHeadModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=MAX_TOKENS, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=pad, eos_token_id=pad, pad_token_id=pad,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train_triplet_lm(folder: Path, schedule: Schedule, device: str = "cpu") -> GPT2LMHeadModel:
    tokenizer = write_lm_tokenizer(folder / "lm_tokenizer")
    lm: Any = new_triplet_lm(len(tokenizer), tokenizer.pad_token_id)
    lm.to(device)

    def loss_of(step: int) -> torch.Tensor:
        texts = [text_of(example_of(step * schedule.batch + i)) for i in range(schedule.batch)]
        tokens, wanted = completion_batch(texts, tokenizer)
        logits = lm(tokens.to(device)).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten().to(device), ignore_index=-100)

    return fit("triplet_lm", folder, lm, loss_of, schedule)


def completion_batch(
    texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids ``(n, T)`` and targets, -100 on prompts and padding."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in texts]
    completions = [tokenizer(completion)["input_ids"] for _, completion in texts]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    tokens = torch.full((len(texts), length), tokenizer.pad_token_id)
    wanted = torch.full((len(texts), length), -100)
    for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        tokens[row, : len(p) + len(c)] = torch.tensor(p + c)
        wanted[row, len(p) : len(p) + len(c)] = torch.tensor(c)
    return tokens, wanted


def save_triplet_lm(lm: GPT2LMHeadModel, tokenizer_folder: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    lm.half().save_pretrained(folder, safe_serialization=True)
    lm.float()
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
