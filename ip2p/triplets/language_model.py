"""Writes completions with a causal language model from a local folder (paper, section 3.1, which used GPT-3).

The decode loop is the project's own, because each row must draw from a generator of its own: what is written for a
caption then depends on the caption, the run's seed and the try, not on its neighbours or the worker. This file neither
parses completions nor trains the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ip2p.config import Triplets
from ip2p.errors import CheckpointError
from ip2p.models.components import model_folder
from ip2p.seeds import derive_seed
from ip2p.triplets.format import STOP, until_stop
from ip2p.triplets.writer_model import end_tokens, load_writer_model, read_manner

ROWS_PER_CALL = 64
LEAVE_AT = 0.75
"""Rows that have ended leave the batch when no more than this share of it is still writing."""
_TAIL_TOKENS = 8  # at least as many as STOP can take, so that looking for it does not decode the whole row each step


class Asking(Protocol):
    """How a prompt becomes tokens (``writer_model.Manner``, or a judge's question)."""

    def token_ids(self, tokenizer: Any, prompt: str) -> list[int]: ...


class LanguageModelWriter:
    """Any Hugging Face causal LM in a folder with safetensors weights, or the embedded one (``embedded``).

    ``device`` is ``auto`` (CUDA if there is one) or a torch device. On the CPU the model runs in float32, elsewhere in
    the type its weights are stored in. Raises RecipeError if no folder is named, CheckpointError if it cannot be used.
    ``manner`` replaces what the folder says of how to ask it.
    """

    def __init__(self, folder: str, triplets: Triplets, seed: int, device: str = "auto", manner: Asking | None = None):
        from ip2p.models.components import resolve_device

        path = model_folder("triplet_lm", folder)
        model, tokenizer = load_writer_model(path, resolve_device(device))
        self._begin(model, tokenizer, manner or read_manner(path), triplets, seed, str(path))

    @classmethod
    def around(cls, model: Any, tokenizer: Any, manner: Asking, triplets: Triplets, seed: int) -> LanguageModelWriter:
        """A writer with a model that is in memory already, for example one in training."""
        writer = cls.__new__(cls)
        writer._begin(model, tokenizer, manner, triplets, seed, "the model")
        return writer

    def _begin(self, model: Any, tokenizer: Any, manner: Asking, triplets: Triplets, seed: int, name: str) -> None:
        self.model, self.tokenizer, self.manner = model, tokenizer, manner
        self.triplets, self.seed, self.name = triplets, seed, name
        self.device = next(model.parameters()).device
        self.ends = end_tokens(model, tokenizer)
        self.context: int = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.tokens_written = 0

    def complete(self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]) -> list[str]:
        """A completion for each prompt, cut before STOP; empty where the prompt fills the model's whole context.

        ``identities[i]`` is what makes a choice of row i its own, for example ``(prompt_id, try)``: the same identity
        gives the same text again, in any company, as far as float rounding allows. Prompts of about one length go
        through the model together.
        """
        prompt_ids = [self.manner.token_ids(self.tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), ROWS_PER_CALL):
            rows = order[start : start + ROWS_PER_CALL]
            written = self._complete_together([prompt_ids[i] for i in rows], [identities[i] for i in rows])
            for i, text in zip(rows, written, strict=True):
                texts[i] = text
        return texts

    @torch.inference_mode()
    def _complete_together(
        self, prompt_ids: Sequence[list[int]], identities: Sequence[tuple[object, ...]]
    ) -> list[str]:
        room = [max(0, min(self.triplets.max_tokens, self.context - len(ids))) for ids in prompt_ids]
        written: list[list[int]] = [[] for _ in prompt_ids]
        rows = [i for i in range(len(prompt_ids)) if room[i] and prompt_ids[i]]  # what goes through the model
        if not rows:
            return ["" for _ in prompt_ids]
        uniforms = torch.stack([self._uniforms(identity) for identity in identities])  # (rows, max_tokens)
        tokens, mask = left_padded([prompt_ids[i] for i in rows])  # (B, T) both
        live, cache = set(rows), None
        for step in range(max(room)):
            logits, cache = self._forward(tokens, mask, cache)
            chosen = next_tokens(logits, uniforms[rows, step], self.triplets.temperature, self.triplets.top_p)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row in live and self._is_last(token, written[row], room[row]):
                    live.discard(row)
            if not live:
                break
            tokens, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if len(live) <= LEAVE_AT * len(rows) and hasattr(cache, "batch_select_indices"):
                staying = [place for place, row in enumerate(rows) if row in live]
                rows = [rows[place] for place in staying]
                tokens, mask = tokens[staying], mask[staying]
                cache.batch_select_indices(torch.tensor(staying, device=self.device))
        self.tokens_written += sum(map(len, written))
        return [until_stop(self._decoded(ids)) for ids in written]

    def _uniforms(self, identity: tuple[object, ...]) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, *identity))
        return torch.rand(self.triplets.max_tokens, generator=generator, dtype=torch.float64)

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits ``(B, V)`` of the next token and the grown cache, for new tokens ``(B, t)`` under mask ``(B, T)``."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        # A row that has ended goes on as a passenger; its positions must stay inside the table.
        positions = positions.clamp(max=self.context - 1)
        optional = {"position_ids": positions.to(self.device), "logits_to_keep": 1}
        output = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepted},
        )
        logits = output.logits[:, -1].cpu().double()
        if logits.isnan().any():
            raise CheckpointError(f"{self.name}: the model gives NaN; its weights are damaged, fetch them again")
        return logits, output.past_key_values

    def _is_last(self, token: int, written: list[int], room: int) -> bool:
        if token in self.ends:
            return True
        written.append(token)
        return len(written) >= room or STOP in self._decoded(written[-_TAIL_TOKENS:])

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``(B, T)`` with zeros on the left, and the mask ``(B, T)`` that is 1 where a token is real."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return tokens, mask


def next_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token id a row ``(B,)`` from float64 logits ``(B, V)`` and uniforms ``(B,)`` in [0, 1).

    Temperature 0 takes the likeliest token. Otherwise the inverse of the cumulative distribution in the order of the
    token ids, so that a last-bit change of a logit hardly ever changes the token. ``top_p`` below 1 keeps the smallest
    set of likeliest tokens whose probabilities reach it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        weights = weights.masked_fill(~_nucleus(weights, top_p), 0.0)
    cumulative = weights.cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    # `right` steps over tokens of zero weight when the target falls on their edge.
    chosen = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, places = weights.sort(dim=-1, descending=True, stable=True)
    wanted = ordered.cumsum(dim=-1) - ordered < top_p
    wanted[:, 0] = True  # top_p 0 still leaves the likeliest
    return torch.zeros_like(wanted).scatter(-1, places, wanted)
