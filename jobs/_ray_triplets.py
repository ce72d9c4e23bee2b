"""Written triplets on the cluster: shards of captions to a pool of writers, or, with GPUs, to vLLM by ``ray.data.llm``.

A pool's actors hold a language model each, or are the one client of a server. vLLM schedules rows itself, so there the
driver judges, window by window, and asks again for what was refused.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ip2p.config import Placement
from ip2p.dataset.shards import Shard
from ip2p.errors import InputError, WriterError
from ip2p.seeds import derive_seed
from ip2p.storage import open_folder
from ip2p.triplets.answers import Answers
from ip2p.triplets.assembly import Pacing, http_stage, language_model_stage
from ip2p.triplets.captions import CaptionRow
from ip2p.triplets.format import STOP, until_stop
from ip2p.triplets.writing import WritingRun
from ip2p.triplets.written import finished_part, without_errors, write_part
from jobs._ray import WINDOW, FailedShard, Row, Step, device_of, loaded, on_shard, run_steps

VLLM_BATCH = 64
VLLM_WINDOW = 1024  # shards written between two looks at what was refused: an engine takes minutes to start


@dataclass(frozen=True)
class WrittenShard:
    """What a finished shard tells the driver."""

    name: str
    captions: int
    accepted: int
    cost: float


class WriteTripletShard:
    """``ip2p.triplets.writing.WriteRequests`` on packed shards; writes the part itself, so that few bytes travel."""

    def __init__(self, run: WritingRun, pacing: Pacing, output: str, device: str = "cpu"):
        self.run, self.folder = run, open_folder(output)

        def load() -> typing.Any:
            if run.recipe.triplets.writer == "http":
                return http_stage(run, pacing, self.folder)
            import torch

            if device == "cpu":
                torch.set_num_threads(1)
            return language_model_stage(run, device)

        self.stage = loaded(load)

    def __call__(self, row: Row) -> Row:
        return on_shard(row, lambda captions: self.write(row["name"], captions))

    def write(self, name: str, captions: Sequence[CaptionRow]) -> WrittenShard:
        # Ray calls again where an actor was killed while it cleared up; what is gone by then would be paid twice.
        rows = finished_part(self.folder, name, captions)
        if not rows:
            rows = self.stage()(captions)
            write_part(self.folder, name, rows)
        if self.run.recipe.triplets.writer == "http":
            Answers(self.folder).forget_all_of(without_errors(rows).__contains__)
        return told_of(name, rows)


def told_of(name: str, rows: Sequence[Row]) -> WrittenShard:
    accepted = sum(row["status"] == "accepted" for row in rows)
    return WrittenShard(name, len({row["prompt_id"] for row in rows}), accepted, sum(row["cost"] for row in rows))


def write_shards(
    shards: Sequence[Shard], run: WritingRun, pacing: Pacing, placement: Placement, output: str
) -> Iterator[WrittenShard | FailedShard]:
    """Write the parts of ``shards``; yields each as it is on disk. Raises the Ip2pError of a worker, or JobError."""
    # One client of a server: pace and budget are its own.
    pool = (1, 1) if run.recipe.triplets.writer == "http" else placement.lm_actors
    arguments = (run, pacing, output, device_of(placement.lm_gpus))
    step = Step(WriteTripletShard, arguments, pool, placement.lm_cpus, placement.lm_gpus)
    for start in range(0, len(shards), WINDOW):
        window = {shard.name: list(shard.rows) for shard in shards[start : start + WINDOW]}
        for _, done in run_steps([step], window):
            yield done


def write_shards_by_vllm(
    shards: Sequence[Shard], run: WritingRun, placement: Placement, output: str
) -> Iterator[WrittenShard]:
    """The same by vLLM engines, one a GPU; a window of shards is judged here before its parts are written."""
    folder = open_folder(output)
    stage = language_model_stage(run, "auto", VllmWriter(run, placement))
    for start in range(0, len(shards), VLLM_WINDOW):
        window = shards[start : start + VLLM_WINDOW]
        rows = stage([caption for shard in window for caption in shard.rows])
        for shard in window:
            members = {caption.prompt_id for caption in shard.rows}
            part = [row for row in rows if row["prompt_id"] in members]
            write_part(folder, shard.name, part)
            yield told_of(shard.name, part)


class VllmWriter:
    """A writer (``ip2p.triplets.stage.Writer``) that sends all prompts at once through a Ray Data LLM processor.

    Raises InputError where vLLM is not installed.
    """

    def __init__(self, run: WritingRun, placement: Placement):
        import importlib.util

        from transformers import AutoTokenizer

        from ip2p.models.components import model_folder
        from ip2p.triplets.writer_model import read_manner

        if importlib.util.find_spec("vllm") is None:
            raise InputError("--engine vllm needs the package vllm on the workers; leave it out to use transformers")
        self.triplets, self.seed = run.recipe.triplets, run.recipe.seed
        folder = model_folder("triplet_lm", run.recipe.models.triplet_lm)
        self.manner = read_manner(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.settings = vllm_settings(str(folder), placement)

    def complete(self, prompts: Sequence[str], identities: Sequence[tuple[object, ...]]) -> Sequence[str | WriterError]:
        """A completion for each prompt, cut before STOP, or the error that vLLM met with this row."""
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        processor = build_processor(
            vLLMEngineProcessorConfig(**self.settings), postprocess=lambda row: answer_columns(row)
        )
        rows = [self.request(i, prompts[i], identities[i]) for i in range(len(prompts))]
        answers: list[str | WriterError] = [WriterError("vLLM gave no answer")] * len(prompts)
        for row in processor(ray.data.from_items(rows)).iter_rows():
            answers[row["place"]] = WriterError(row["error"]) if row["error"] else until_stop(row["text"])
        return answers

    def request(self, place: int, prompt: str, identity: tuple[object, ...]) -> Row:
        """The columns that vLLM's stage takes, and the row's place."""
        sampling = {
            "temperature": self.triplets.temperature, "top_p": self.triplets.top_p,
            "max_tokens": self.triplets.max_tokens, "stop": [STOP], "seed": derive_seed(self.seed, *identity) % 2**31,
        }  # fmt: skip
        token_ids = self.manner.token_ids(self.tokenizer, prompt)
        return {"place": place, "prompt": prompt, "tokenized_prompt": token_ids, "sampling_params": sampling}


def vllm_settings(folder: str, placement: Placement) -> dict[str, typing.Any]:
    """Keywords of ``vLLMEngineProcessorConfig``: engines that share the GPUs as writers do; prompts come in tokens."""
    low, high = placement.lm_actors
    return {
        "model_source": folder, "concurrency": high if low == high else (low, high), "batch_size": VLLM_BATCH,
        "engine_kwargs": {
            "enable_prefix_caching": False,  # captions share no beginning
            "gpu_memory_utilization": min(0.9, placement.lm_gpus or 0.9),
            "max_model_len": 1024,
        },
        "chat_template_stage": False, "tokenize_stage": False, "detokenize_stage": False,
        "should_continue_on_error": True,
    }  # fmt: skip


def answer_columns(row: Row) -> Row:
    """What is kept of a row that has been through vLLM."""
    return {
        "place": row["place"], "text": row.get("generated_text") or "", "error": row.get("__inference_error__") or ""
    }  # fmt: skip
