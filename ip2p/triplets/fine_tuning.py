"""Teaches a causal language model to write triplets (paper, section 3.1: davinci on 700 of them, one epoch).

All weights, or low-rank additions to every linear layer (LoRA); the loss is on the completion alone. The batch of a
step is a function of the step, and what a step leaves is weights and moments, so a run that was killed goes on as if
it had not been. What the model then writes is measured in valid_rate.py; who starts the workers is for a job.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ip2p.errors import InputError, RecipeError, TrainingError
from ip2p.schema import Triplet
from ip2p.storage import Folder
from ip2p.training.averaging import mean_over_workers
from ip2p.training.checkpoints import Checkpoint, latest_whole, save_checkpoint
from ip2p.training.order import Order
from ip2p.triplets.format import completion_of, prompt_of
from ip2p.triplets.writer_model import PROMPT_FORMATS, Manner

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FineTuning:
    """What comes out. Two runs of one recipe on one kind of CPU leave the same weights, killed in between or not."""

    base: str = ""  # folder of a causal LM with safetensors, or a .gguf file
    prompt_format: str = "original"  # original (the paper's delimiters) | chat (the model's own template)
    tasks: int = 1  # 1: the prompt names the wanted type of edit; 0: as the original, which knows none
    lora_rank: int = 16  # 0: all weights are trained
    epochs: int = 3
    batch: int = 8  # triplets a step, over all workers
    learning_rate: float = 1e-3  # for all weights (lora_rank 0) rather 5e-5
    warmup: float = 0.05  # share of the steps; then a cosine down to a tenth
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 256  # longer triplets are refused
    held_out: int = 100  # last triplets of the file, never trained on
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def manner(self) -> Manner:
        """How the trained model is to be asked."""
        return Manner(self.prompt_format, bool(self.tasks))


def check_fine_tuning(recipe: FineTuning) -> None:
    """Raise RecipeError where a value cannot work."""
    rules = (
        (bool(recipe.base), "base is empty; name a model folder or a .gguf file with --set base=PATH"),
        (recipe.prompt_format in PROMPT_FORMATS, f"prompt_format is {' or '.join(PROMPT_FORMATS)}"),
        (recipe.tasks in (0, 1), "tasks is 0 or 1"),
        (recipe.lora_rank >= 0, "lora_rank must be >= 0"),
        (recipe.epochs >= 1 and recipe.batch >= 1, "epochs and batch must be at least 1"),
        (recipe.learning_rate > 0, "learning_rate must be > 0"),
        (0 <= recipe.warmup < 1, "warmup is a share of the steps, 0..1"),
        (recipe.held_out >= 1, "held_out must be at least 1"),
    )
    for holds, message in rules:
        if not holds:
            raise RecipeError(message)


@dataclass(frozen=True)
class Example:
    """One triplet in tokens; the model learns to write ``completion`` after ``prompt``."""

    prompt: list[int]
    completion: list[int]


def examples_of(triplets: Sequence[Triplet], tokenizer: Any, recipe: FineTuning) -> list[Example]:
    """``triplets`` as tokens, in their order. Raises InputError for one that is longer than ``recipe.max_tokens``."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for triplet in triplets:
        # Apart, since a writer sees the prompt apart: a token must not straddle its end.
        prompt = recipe.manner.token_ids(tokenizer, prompt_of(triplet.caption, triplet.task))
        completion = tokenizer(completion_of(triplet), add_special_tokens=False, verbose=False)["input_ids"]
        examples.append(Example(prompt, [*completion, *end]))
        length = len(prompt) + len(examples[-1].completion)
        if length > recipe.max_tokens:
            raise InputError(
                f"the triplet of {triplet.caption[:40]!r} has {length} tokens, max_tokens is {recipe.max_tokens}"
            )
    return examples


def split_held_out(triplets: Sequence[Triplet], recipe: FineTuning) -> tuple[list[Triplet], list[Triplet]]:
    """Those to train on, and the last ``recipe.held_out`` of them. Raises InputError where none would be left."""
    if len(triplets) <= recipe.held_out:
        raise InputError(f"{len(triplets)} triplets leave none to train on; lower --set held_out={recipe.held_out}")
    return list(triplets[: -recipe.held_out]), list(triplets[-recipe.held_out :])


def prepare_model(model: Any, recipe: FineTuning) -> Any:
    """``model`` with what is to be trained requiring gradients; with LoRA the same model with small layers beside its
    own, which change nothing at first. Raises InputError without the package peft."""
    if not recipe.lora_rank:
        return model.float().requires_grad_(True)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("lora_rank needs the package peft: `pip install ip2p[lm]`, or `--set lora_rank=0`") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        # All linear layers but the head; dropout 0, so that a step draws no random number.
        config = LoraConfig(
            r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(model, config)


def plain_model(model: Any, recipe: FineTuning) -> Any:
    """A copy of a trained ``model`` with the low-rank additions folded in, to be saved as any other."""
    import copy

    return copy.deepcopy(model).merge_and_unload() if recipe.lora_rank else model


@dataclass
class State:
    """All that changes while training."""

    model: Any
    parameters: dict[str, torch.nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    recipe: FineTuning
    step: int = 0


def start(model: Any, recipe: FineTuning) -> State:
    """A state at step 0 for what ``prepare_model`` returned."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return State(model, parameters, optimizer, recipe)


def restore(state: State, checkpoints: Folder) -> None:
    """Bring ``state`` to the newest whole checkpoint, if there is one."""
    last = latest_whole(checkpoints)
    if last is None:
        return
    state.step = last.step
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(last.tensors["weights"][name])
            moments = {kind: last.tensors[kind][name].to(parameter.device) for kind in MOMENTS}
            state.optimizer.state[parameter] = {"step": torch.tensor(float(last.step)), **moments}


def save(state: State, checkpoints: Folder) -> None:
    """Write the state as a checkpoint; the two newest are kept."""
    moments = {
        kind: {name: state.optimizer.state[parameter][kind] for name, parameter in state.parameters.items()}
        for kind in MOMENTS
    }
    weights = {name: parameter.detach() for name, parameter in state.parameters.items()}
    save_checkpoint(checkpoints, Checkpoint(state.step, {"step": state.step}, {"weights": weights, **moments}), keep=2)


def steps_of(examples: int, recipe: FineTuning) -> int:
    """Optimizer steps of the whole run."""
    return math.ceil(examples * recipe.epochs / recipe.batch)


def ended_epoch(step: int, examples: int, recipe: FineTuning) -> int | None:
    """The epoch that optimizer step ``step`` ended (0 before the first step), None for a step within one."""
    epoch, before = (done * recipe.batch // examples for done in (step, step - 1))
    return epoch if epoch > before or step == steps_of(examples, recipe) else None


def learning_rate_at(step: int, steps: int, recipe: FineTuning) -> float:
    """The rate of the step after ``step`` finished ones: a warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def fine_tune(
    state: State,
    examples: Sequence[Example],
    checkpoints: Folder,
    report: Callable[[dict[str, Any]], object],
    at_epoch: Callable[[int], dict[str, Any]] = lambda epoch: {},
    *,
    checkpoint_every_s: float = 120.0,
    micro_batch: int = 8,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train ``state`` to the recipe's end, going on from its step.

    ``report`` gets step, epoch, loss (of the global batch, per token), tokens_per_s, and at an epoch's end what
    ``at_epoch(epoch)`` returns (rank 0 alone calls it). Several workers share each batch and leave the weights that
    one would, up to rounding. Raises TrainingError where the loss is no number.
    """
    recipe, steps = state.recipe, steps_of(len(examples), state.recipe)
    order = Order(len(examples), recipe.batch, recipe.seed)
    saved = time.monotonic()
    state.model.train()
    while state.step < steps:
        began = time.monotonic()
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step, steps, recipe)
        everyone = [examples[i] for i in order.batch(state.step)]
        _, mine = order.rows_of(state.step, rank, world)
        loss = _step(state, [examples[i] for i in mine], _completion_tokens(everyone), micro_batch, world)
        state.step += 1
        ended = ended_epoch(state.step, len(examples), recipe)
        told: dict[str, Any] = {"step": state.step, "loss": loss}
        told["epoch"] = state.step * recipe.batch // len(examples)
        told["tokens_per_s"] = sum(len(e.prompt) + len(e.completion) for e in everyone) / (time.monotonic() - began)
        # Before the look, which may take longer than the epoch.
        if rank == 0 and (ended is not None or time.monotonic() - saved > checkpoint_every_s):
            save(state, checkpoints)
            saved = time.monotonic()
        if rank == 0 and ended is not None:
            told |= at_epoch(ended)
            state.model.train()
        if rank == 0:
            report(told)


def _step(state: State, mine: Sequence[Example], tokens: int, micro_batch: int, world: int) -> float:
    """One optimizer step; returns the loss of the global batch, which has ``tokens`` completion tokens."""
    loss = 0.0
    for rows in _cut(mine, micro_batch):
        part = summed_loss(state.model, rows) / tokens
        part.backward()
        loss += part.item()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in state.parameters.values()]
    if world > 1:
        total = torch.tensor([loss], device=gradients[0].device)
        mean_over_workers([*gradients, total])
        for gradient in gradients:
            gradient *= world  # each worker's part was a share of one sum
        loss = total.item() * world
    if not math.isfinite(loss):
        raise TrainingError(f"step {state.step + 1}: the loss is {loss}; lower --set learning_rate")
    for parameter, gradient in zip(state.parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(state.parameters.values(), state.recipe.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return loss


def summed_loss(model: Any, rows: Sequence[Example]) -> torch.Tensor:
    """The sum over the completions' tokens of what the model pays for each, in nats; a scalar."""
    device = next(model.parameters()).device
    length = max(len(row.prompt) + len(row.completion) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)  # (B, T), padded on the right
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    wanted = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids = row.prompt + row.completion
        tokens[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
        wanted[i, len(row.prompt) : len(ids)] = torch.tensor(row.completion)
    logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits[:, :-1]  # (B, T - 1, V)
    return F.cross_entropy(
        logits.float().flatten(0, 1), wanted[:, 1:].flatten().to(device), ignore_index=-100, reduction="sum"
    )


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example], micro_batch: int = 8) -> float:
    """Mean loss a completion token on ``examples``, in nats."""
    model.eval()
    total = sum(summed_loss(model, rows).item() for rows in _cut(examples, micro_batch))
    return total / _completion_tokens(examples)


def openai_lines(triplets: Sequence[Triplet], recipe: FineTuning) -> Iterator[str]:
    """The lines of a fine-tuning file for OpenAI's service, or one that takes the same.

    ``original``: prompt and completion, as the original uploaded them; ``chat``: messages, as later models want them.
    """
    from ip2p.triplets.format import chat_messages

    for triplet in triplets:
        prompt, completion = prompt_of(triplet.caption, triplet.task if recipe.tasks else ""), completion_of(triplet)
        if recipe.prompt_format == "original":
            yield json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)
        else:
            answer = {"role": "assistant", "content": completion}
            yield json.dumps({"messages": [*chat_messages(prompt), answer]}, ensure_ascii=False)


def _completion_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.completion) for example in examples)


def _cut(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
