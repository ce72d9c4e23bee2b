"""A language model's folder as a triplet writer: weights, tokenizer, and a note of how the model wants to be asked.

``triplet_writer.json`` beside the weights is that note; a folder without one is asked in the original's way, without
edit types. A GGUF file (llama.cpp's format) becomes such a folder first. This file neither trains nor samples.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ip2p.errors import CheckpointError, InputError
from ip2p.triplets.format import DELIMITER_1, STOP, chat_messages, prompt_of, split_prompt

NOTE = "triplet_writer.json"
PROMPT_FORMATS = ("original", "chat")


@dataclass(frozen=True)
class Manner:
    """How a model is asked: in the original's delimiters or by its chat template, and whether it knows edit types."""

    prompt_format: str = "original"
    tasks: bool = False

    def token_ids(self, tokenizer: Any, prompt: str) -> list[int]:
        """The tokens of what ``format.prompt_of`` made, as this model is to see them."""
        if not self.tasks:
            prompt = prompt_of(split_prompt(prompt)[0])
        if self.prompt_format == "original":
            return list(tokenizer(prompt, verbose=False)["input_ids"])
        text = tokenizer.apply_chat_template(chat_messages(prompt), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_manner(folder: Path) -> Manner:
    """The note of ``folder``, or the original's manner; CheckpointError for a note that cannot be read."""
    path = folder / NOTE
    if not path.is_file():
        return Manner()
    try:
        manner = Manner(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a note of how to ask this model ({error}); fetch it again") from error
    if manner.prompt_format not in PROMPT_FORMATS:
        raise CheckpointError(f"{path}: prompt_format is {' or '.join(PROMPT_FORMATS)}, not {manner.prompt_format!r}")
    return manner


def save_writer_model(folder: Path, model: Any, tokenizer: Any, manner: Manner) -> None:
    """Everything that ``load_writer_model`` and other programs need, the note last."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / NOTE).write_text(json.dumps(dataclasses.asdict(manner), indent=1) + "\n")


def load_writer_model(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model (eval, frozen; float32 on the CPU, elsewhere as stored) and tokenizer; CheckpointError with the reason."""
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


def gguf_to_folder(file: Path, folder: Path) -> None:
    """Read a ``.gguf`` file through transformers and write it as a folder of float32 safetensors, if not yet there.

    Quantised weights become the numbers that they stand for. Raises InputError without the package gguf, or where
    the file cannot be read.
    """
    if (folder / NOTE).is_file():
        return
    try:
        import gguf  # noqa: F401  transformers asks for it with a longer message
    except ImportError as error:
        raise InputError(f"{file}: reading GGUF needs the package gguf: `pip install ip2p[lm]`") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **read)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **read)
    except Exception as error:  # its reader raises whatever a wrong byte leads to
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: transformers cannot read it ({detail})") from error
    # What it was read from would keep transformers from writing it as the plain model that it is now.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    save_writer_model(folder, model, tokenizer, Manner())


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens after which the model says nothing more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {end for end in ends if end is not None}


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
