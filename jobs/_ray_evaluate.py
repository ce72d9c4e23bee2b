"""The evaluation's stage on Ray: a part of an exam, or of a curve, to records. What is measured: ip2p.evaluation."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ip2p.config import Recipe
from jobs._ray import Row, Step, device_of, on_shard, run_steps

if typing.TYPE_CHECKING:
    from ip2p.evaluation.edit_success import EditExamples
    from ip2p.evaluation.trade_off import Sample
    from ip2p.postcards.grammar import EditExample
    from ip2p.training.pair_index import ShardRows
    from jobs._ray_train import Team


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on, beside the pictures."""

    model: str
    weights: dict[str, str]  # id of each part of each model
    recipe: Recipe
    guidance_scales: tuple[float, ...]
    image_guidance_scales: tuple[float, ...]
    steps: int
    strength: float
    sdedit_guidance_scale: float
    seed: int
    exam: int

    def shown(self) -> dict[str, typing.Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Part:
    """``count`` pictures from number ``first`` on, for one method; ``shard`` where they are pairs of a run."""

    method: str
    first: int
    count: int
    shard: ShardRows | None = None


class EvaluatePart:
    """Parts to records. Models are loaded when the first part needs them, and kept."""

    def __init__(self, settings: Settings, device: str):
        self.settings, self.device = settings, device
        self._made: list[EditExample] = []

    def __call__(self, row: Row) -> Row:
        return on_shard(row, self.measure)

    def measure(self, part: Part) -> list[dict[str, typing.Any]]:
        import torch

        if self.device == "cpu":
            torch.set_num_threads(1)  # as many actors as cores
        return self._curve(part) if part.method == "curve" else self._exam(part)

    def _exam(self, part: Part) -> list[dict[str, typing.Any]]:
        from ip2p.evaluation.edit_success import measure_edits

        examples = self._examples(part.first + part.count)[part.first :]
        records = measure_edits(
            self._method(part.method), examples, self._reader, self.settings.seed, first=part.first
        )  # fmt: skip
        return [{"method": part.method, **record} for record in records]

    def _curve(self, part: Part) -> list[dict[str, typing.Any]]:
        from ip2p.evaluation.trade_off import measure_trade_off

        settings = self.settings
        return measure_trade_off(
            functools.partial(self._editor.edit, steps=settings.steps), self._clip, self._samples(part),
            settings.image_guidance_scales, settings.guidance_scales, settings.seed,
        )  # fmt: skip

    def _method(self, name: str) -> EditExamples:
        from ip2p.evaluation.edit_success import by_edited_caption, by_instruction, drawn_truth, no_edit
        from ip2p.evaluation.sdedit import sdedit
        from ip2p.postcards.family.drawings import SIZE

        if name in ("no edit", "truth"):
            return {"no edit": no_edit, "truth": drawn_truth}[name]
        settings = self.settings
        if name == "sdedit":
            return by_edited_caption(
                functools.partial(
                    sdedit, self._text_to_image, strength=settings.strength, steps=settings.steps,
                    guidance_scale=settings.sdedit_guidance_scale,
                )
            )  # fmt: skip
        return by_instruction(
            functools.partial(
                self._editor.edit, steps=settings.steps, guidance_scale=settings.guidance_scales[0],
                image_guidance_scale=settings.image_guidance_scales[0], resolution=SIZE,
            )
        )  # fmt: skip

    def _samples(self, part: Part) -> list[Sample]:
        """The part's pictures with both captions, postcards or pairs."""
        from ip2p.evaluation.trade_off import Sample
        from ip2p.images import decode_image
        from ip2p.postcards.family.drawings import SIZE
        from ip2p.postcards.renderer import render
        from ip2p.training.pair_index import read_shard_rows

        if part.shard is None:
            return [
                Sample(f"{part.first + place:06d}", render(one.scene, SIZE), one.instruction, one.caption,
                       one.edited_caption)
                for place, one in enumerate(self._examples(part.first + part.count)[part.first :])
            ]  # fmt: skip
        return [
            Sample(pair["pair_id"], decode_image(pair["original_image"]["bytes"]), pair["instruction"],
                   pair["caption"], pair["edited_caption"])
            for pair in read_shard_rows(part.shard)
        ]  # fmt: skip

    def _examples(self, count: int) -> list[EditExample]:
        from ip2p.evaluation.edit_success import held_out_examples

        if count > len(self._made):
            self._made = held_out_examples(count, self.settings.exam)
        return self._made[:count]

    @functools.cached_property
    def _editor(self) -> typing.Any:
        from ip2p.editing.editor import Editor
        from ip2p.models.components import load_edit_model

        return Editor(load_edit_model(self.settings.model, self.settings.recipe.models.dtype, self.device))

    @functools.cached_property
    def _text_to_image(self) -> typing.Any:
        from ip2p.models.components import load_text_to_image

        return load_text_to_image(self.settings.recipe.models, self.device)

    @functools.cached_property
    def _clip(self) -> typing.Any:
        from ip2p.models.components import load_clip

        return load_clip(self.settings.recipe.models, self.device)

    @functools.cached_property
    def _reader(self) -> typing.Any:
        from ip2p.models.components import embedded_folder
        from ip2p.postcards.reader import load_reader

        return load_reader(embedded_folder("reader"))


def evaluate_parts(
    settings: Settings, parts: Mapping[str, Part], team: Team, pool: tuple[int, int]
) -> Iterator[tuple[str, typing.Any]]:
    """Names and records of ``parts`` as they are done by ``pool`` (min, max) actors, or a FailedShard."""
    step = Step(EvaluatePart, (settings, device_of(team.gpus)), pool, 1.0 if team.gpus else 0.7, team.gpus)
    yield from run_steps([step], parts)
