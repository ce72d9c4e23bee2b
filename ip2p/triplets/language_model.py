"""Writes completions with a causal language model from a local folder (paper, section 3.1, which used GPT-3).

The decode loop is the project's own, because each row must draw from a generator of its own: what is written for a
caption then depends on the caption, the run's seed and the try, not on its neighbours or the worker. This file neither
parses completions nor trains the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ip2p.config import Triplets
from ip2p.errors import CheckpointError
from ip2p.models.components import model_folder
from ip2p.seeds import derive_seed
from ip2p.triplets.format import DELIMITER_1, STOP, until_stop

ROWS_PER_CALL = 64
_TAIL_TOKENS = 8  # at least as many as STOP can take, so that looking for it does not decode the whole row each step


class LanguageModelWriter:
    """Any Hugging Face causal LM in a folder with safetensors weights, or the embedded one (``embedded``).

    ``device`` is ``auto`` (CUDA if there is one) or a torch device. On the CPU the model runs in float32, elsewhere in
    the type its weights are stored in. Raises RecipeError if no folder is named, CheckpointError if it cannot be used.
    """

    def __init__(self, folder: str, triplets: Triplets, seed: int, device: str = "auto"):
        from ip2p.models.components import resolve_device

        self.triplets, self.seed = triplets, seed
        self.device = resolve_device(device)
        self.folder = model_folder("triplet_lm", folder)
        self.model, self.tokenizer = _load(self.folder, self.device)
        self.ends = _end_tokens(self.model, self.tokenizer)
        self.context: int = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        self.accepted = set(inspect.signature(self.model.forward).parameters)

    def complete(self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]) -> list[str]:
        """A completion for each prompt, cut before STOP; empty where the prompt fills the model's whole context.

        ``identities[i]`` is what makes a choice of row i its own, for example ``(prompt_id, try)``: the same identity
        gives the same text again, in any company, as far as float rounding allows.
        """
        texts: list[str] = []
        for start in range(0, len(prompts), ROWS_PER_CALL):
            span = slice(start, start + ROWS_PER_CALL)
            texts += self._complete_together(prompts[span], identities[span])
        return texts

    @torch.inference_mode()
    def _complete_together(self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]) -> list[str]:
        prompt_ids = [self.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
        room = [max(0, min(self.triplets.max_tokens, self.context - len(ids))) for ids in prompt_ids]
        written: list[list[int]] = [[] for _ in prompts]
        writing = [i for i in range(len(prompts)) if room[i] and prompt_ids[i]]
        if not writing:
            return ["" for _ in prompts]
        uniforms = torch.stack([self._uniforms(identities[i]) for i in writing])  # (B, max_tokens)
        tokens, mask = left_padded([prompt_ids[i] for i in writing])  # (B, T) both
        live, cache = set(range(len(writing))), None
        for step in range(max(room[i] for i in writing)):
            logits, cache = self._forward(tokens, mask, cache)
            chosen = next_tokens(logits, uniforms[:, step], self.triplets.temperature, self.triplets.top_p)
            for row, token in enumerate(chosen.tolist()):
                if row in live and self._is_last(token, written[writing[row]], room[writing[row]]):
                    live.discard(row)
            if not live:
                break
            tokens, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
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
            raise CheckpointError(f"{self.folder}: the model gives NaN; its weights are damaged, fetch them again")
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


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its type leaves out the pair that it returns here
    try:
        model, loaded = from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(_cannot_load(folder, str(error))) from error
    if loaded["missing_keys"]:  # transformers would go on with random numbers in their place
        raise CheckpointError(_cannot_load(folder, f"weights missing: {', '.join(sorted(loaded['missing_keys'])[:3])}"))
    return model.to(device).eval().requires_grad_(False), _load_tokenizer(folder)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more particular for a broken file
        raise CheckpointError(_cannot_load(folder, f"tokenizer: {error}")) from error
    # Where its files are missing transformers makes an empty tokenizer and says nothing.
    marks = f"a{DELIMITER_1}b{STOP}"
    if tokenizer.decode(tokenizer(marks)["input_ids"], skip_special_tokens=True) != marks:
        raise CheckpointError(_cannot_load(folder, "its tokenizer cannot spell the format's delimiters"))
    return tokenizer


def _cannot_load(folder: Path, found: str) -> str:
    detail = (found.splitlines() or ["no detail"])[0]
    return (f"{folder}: cannot load a causal language model from it ({detail}); "
            "it needs config.json, a tokenizer and whole *.safetensors weights; fetch it again")  # fmt: skip


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {end for end in ends if end is not None}
