"""Fine-tuning of a language model by Ray Train: what a worker does with ``ip2p.triplets.fine_tuning``."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ip2p.config import Triplets
from ip2p.schema import Triplet
from ip2p.storage import Folder, open_folder, remove_all
from ip2p.triplets.fine_tuning import FineTuning
from jobs._ray_train import MetricsFile, run_worker

MODEL, SAMPLES = "model", "samples.jsonl"


@dataclass(frozen=True)
class FineTuneWork:
    """What all workers of a run are given."""

    recipe: FineTuning
    output: str  # uri of the run's folder
    triplets: list[Triplet]  # the last recipe.held_out of them are not trained on
    captions: list[tuple[str, str]]  # caption and type, on which the valid rate is measured; may be empty
    types: str  # whose types these are: open or postcard
    sampling: Triplets  # how completions are drawn then
    threads: int = 1  # of a CPU worker
    micro_batch: int = 8
    report_every: int = 10


def worker_loop(settings: dict[str, typing.Any]) -> None:
    """Ray Train's loop per worker."""

    def smaller(work: FineTuneWork) -> str:
        return f"with --micro-batch {work.micro_batch}; halve it, or train fewer weights with --set lora_rank=16"

    run_worker(settings, _fine_tune, smaller)


def _fine_tune(work: FineTuneWork, board: typing.Any) -> None:
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from ip2p.triplets import fine_tuning
    from ip2p.triplets.writer_model import load_writer_model

    context = get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(work.threads)
    recipe, folder = work.recipe, open_folder(work.output)
    model, tokenizer = load_writer_model(base_folder(recipe.base), device)
    trained, held_out = fine_tuning.split_held_out(work.triplets, recipe)
    examples, unseen = (fine_tuning.examples_of(part, tokenizer, recipe) for part in (trained, held_out))
    state = fine_tuning.start(fine_tuning.prepare_model(model, recipe), recipe)
    checkpoints = open_folder(f"{work.output}/checkpoints")
    fine_tuning.restore(state, checkpoints)
    look = look_of(work, state.model, tokenizer, unseen, folder)
    metrics = MetricsFile(folder, state.step) if rank == 0 else None
    if metrics is not None:
        board.tell.remote("begun", {"step": state.step, "workers": world})
        epoch = fine_tuning.ended_epoch(state.step, len(examples), recipe)
        # Before the first step; or the start before this one ended between a checkpoint and its look.
        if epoch is not None and all(row["step"] != state.step for row in metrics.rows):
            metrics.add({"step": state.step, "epoch": epoch, **look(epoch)})
            board.tell.remote("metrics", metrics.rows[-1])

    def report(told: dict[str, typing.Any]) -> None:
        if metrics is not None and ("held_out_loss" in told or told["step"] % work.report_every == 0):
            metrics.add(told)
            board.tell.remote("metrics", told)

    fine_tuning.fine_tune(
        state, examples, checkpoints, report, look, micro_batch=work.micro_batch, rank=rank, world=world
    )  # fmt: skip
    if rank == 0:
        export(fine_tuning.plain_model(state.model, recipe), tokenizer, recipe, folder)


def look_of(
    work: FineTuneWork, model: typing.Any, tokenizer: typing.Any, unseen: Sequence[typing.Any], folder: Folder
) -> Callable[[int], dict[str, typing.Any]]:
    """A function of the epoch: loss on held-out triplets, and the valid rate of what is written for held-out captions.

    What was written is left in ``samples.jsonl``.
    """
    from ip2p.triplets.edit_types import edit_types
    from ip2p.triplets.fine_tuning import held_out_loss
    from ip2p.triplets.language_model import LanguageModelWriter
    from ip2p.triplets.valid_rate import valid_rate, write_each

    def look(epoch: int) -> dict[str, typing.Any]:
        found: dict[str, typing.Any] = {"held_out_loss": held_out_loss(model, unseen, work.micro_batch)}
        if work.captions:
            writer = LanguageModelWriter.around(
                model, tokenizer, work.recipe.manner, work.sampling, work.recipe.seed
            )  # fmt: skip
            written = write_each(writer, work.captions, edit_types(work.types))
            lines = [json.dumps(one.as_record(), ensure_ascii=False) for one in written]
            folder.write(SAMPLES, ("\n".join(lines) + "\n").encode())
            found |= valid_rate(written)
        return found

    return look


def base_folder(base: str) -> Path:
    """``base``, or the folder that a .gguf file becomes, made once a machine."""
    from ip2p.models.components import model_folder
    from ip2p.triplets.writer_model import gguf_to_folder

    path = Path(base).expanduser()
    if path.suffix != ".gguf":
        return model_folder("triplet_lm", base)
    found = path.stat()
    id_ = hashlib.sha256(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ip2p-gguf-{id_}"
    if not folder.is_dir():
        making = Path(tempfile.mkdtemp(prefix=f"ip2p-gguf-{id_}-"))
        gguf_to_folder(path, making)
        try:
            making.rename(folder)
        except OSError:  # another worker was faster
            shutil.rmtree(making)
    return folder


def export(model: typing.Any, tokenizer: typing.Any, recipe: FineTuning, folder: Folder) -> None:
    """The trained model as ``model/``, the note of how to ask it last: it says that the folder is whole."""
    from ip2p.triplets.writer_model import NOTE, save_writer_model

    remove_all(folder, f"{MODEL}/")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        save_writer_model(made, model, tokenizer, recipe.manner)
        for path in sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: path.name == NOTE):
            with path.open("rb") as stream:
                folder.write_from(f"{MODEL}/{path.relative_to(made)}", stream)
