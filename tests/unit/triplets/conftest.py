"""Tiny real language models, made once: one with random weights, one that has learnt two captions by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ip2p.schema import Triplet
from ip2p.triplets.format import completion_of, prompt_of

LEARNT = (
    Triplet("a cat on a mat", "make it night", "a cat on a mat at night"),
    Triplet("a boat", "add a moon", "a boat under the moon"),
)
CONTEXT = 64


@pytest.fixture(scope="session")
def learnt() -> tuple[Triplet, ...]:
    return LEARNT


@pytest.fixture(scope="session")
def random_lm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random_lm")
    _save(folder, _model(seed=1), _tokenizer())
    return folder


@pytest.fixture(scope="session")
def taught_lm(tmp_path_factory) -> Path:
    """Writes the learnt triplets for their captions and, unless it is stopped, goes on talking after STOP."""
    folder = tmp_path_factory.mktemp("taught_lm")
    model, tokenizer = _model(seed=2), _tokenizer()
    texts = [prompt_of(t.caption) + completion_of(t) + "\nmore words that nobody asked for" for t in LEARNT]
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2, "the tiny model did not learn its two captions"
    _save(folder, model, tokenizer)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([prompt_of(t.caption) + completion_of(t) for t in LEARNT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=400, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _save(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
