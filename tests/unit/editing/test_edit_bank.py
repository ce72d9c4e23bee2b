"""Edits that join and leave at any step, against the samplers' own loops and against the editor."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import numpy as np
import pytest
import torch

from ip2p.editing.edit_bank import EditBank, EditInputs
from ip2p.editing.editor import Editor, image_latents
from ip2p.editing.step_table import COEFFICIENTS, StepTable, step_table
from ip2p.models.coding import pictures_of, text_states
from ip2p.pairs.sampling import SAMPLERS, PairNoise
from ip2p.pairs.sigmas import sigma_table

SHAPE = (4, 8, 8)
EDITS: list[dict[str, typing.Any]] = [
    {"steps": 1, "sampler": "euler_ancestral", "seed": 1, "guidance_scale": 7.5, "image_guidance_scale": 1.5},
    {"steps": 7, "sampler": "dpmpp_2m", "seed": 2, "guidance_scale": 3.0, "image_guidance_scale": 1.0},
    {"steps": 4, "sampler": "euler_ancestral", "seed": 3, "guidance_scale": 2.0, "image_guidance_scale": 2.0},
    {"steps": 40, "sampler": "euler_ancestral", "seed": 4, "guidance_scale": 0.5, "image_guidance_scale": 0.7},
    {"steps": 2, "sampler": "dpmpp_2m", "seed": 5, "guidance_scale": 1.0, "image_guidance_scale": 1.0},
    {"steps": 9, "sampler": "dpmpp_2m", "seed": 6, "guidance_scale": 9.0, "image_guidance_scale": 0.0},
]
INSTRUCTIONS = ["make it night", "add a moon", "turn it into a castle"]


def table_of(config: dict[str, typing.Any], edit: dict[str, typing.Any], **more: typing.Any) -> StepTable:
    wanted = ("sampler", "steps", "guidance_scale", "image_guidance_scale")
    return step_table(config, **{name: edit[name] for name in wanted}, **more)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def inputs_of(model: typing.Any, edit: dict[str, typing.Any], **more: typing.Any) -> EditInputs:
    noise = PairNoise([edit["seed"]], SHAPE)
    with torch.inference_mode():
        image = image_latents(model, [picture(edit["seed"])])[0]
        text, null = text_states(model, [INSTRUCTIONS[edit["seed"] % 3], ""])
    drawn = torch.cat([noise()[:, 0] for _ in range(edit["steps"])])
    return EditInputs(image, text, null, drawn, table_of(model.scheduler_config, edit), **more)


@pytest.fixture
def bank(edit_model) -> EditBank:
    text = edit_model.text_encoder.config
    return EditBank(
        edit_model.unet, edit_model.scheduler_config, SHAPE, (text.max_position_embeddings, text.hidden_size), slots=2,
        steps=3,
    )  # fmt: skip


def edited(model: typing.Any, latent: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return pictures_of(model.vae, latent[None])[0].astype(int)


def taken(bank: EditBank, slot: int) -> torch.Tensor:
    latent = bank.latent(slot)
    bank.remove(slot)
    return latent


def by_editor(model: typing.Any, edit: dict[str, typing.Any]) -> np.ndarray:
    return Editor(model).edit([picture(edit["seed"])], [INSTRUCTIONS[edit["seed"] % 3]], **edit)[0].astype(int)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_coefficients_are_the_sampler_s_own_loop(sampler: str, steps: int) -> None:
    sigmas = sigma_table({}, steps).tolist()
    random = torch.Generator().manual_seed(steps)
    drawn = [torch.randn(3, 4, generator=random, dtype=torch.float64) for _ in range(steps + 1)]

    def denoise(latents: torch.Tensor, step: int) -> torch.Tensor:
        return torch.tanh(latents * (0.3 + step))

    noise = iter(drawn[1:])
    expected = SAMPLERS[sampler](denoise, drawn[0] * sigmas[0], sigmas, lambda: next(noise))
    latents, before = drawn[0] * sigmas[0], torch.zeros(3, 4, dtype=torch.float64)
    for step, (a, b, c, d) in enumerate(COEFFICIENTS[sampler](sigmas)):
        denoised = denoise(latents, step)
        latents, before = a * latents + b * denoised + c * before + d * drawn[step + 1], denoised
    torch.testing.assert_close(latents, expected, atol=1e-9, rtol=1e-9)


def test_edits_that_join_and_leave_at_any_step_are_those_of_the_editor(edit_model, bank: EditBank) -> None:
    random = np.random.default_rng(3)
    waiting, slots, found = list(range(len(EDITS))), {}, {}
    while waiting or slots:
        if waiting and (not slots or random.random() < 0.4):
            number = waiting.pop()
            slots[bank.add(inputs_of(edit_model, EDITS[number]))] = number
        chosen = [slot for slot in slots if random.random() < 0.7] or list(slots)[:1]
        bank.step(chosen)
        for slot in [slot for slot in slots if bank.rows_of(slot) == 0]:
            found[slots.pop(slot)] = taken(bank, slot)
    assert len(bank) == 0
    for number, edit in enumerate(EDITS):
        assert np.abs(edited(edit_model, found[number]) - by_editor(edit_model, edit)).max() <= 1, edit
    assert bank.row_evals == 1 * 3 + 7 * 2 + 4 * 2 + 40 * 3 + 2 * 1 + 9 * 3


def test_rows_are_counted_before_they_are_run(edit_model, bank: EditBank) -> None:
    slot = bank.add(inputs_of(edit_model, EDITS[1]))
    assert (bank.rows_of(slot), bank.left(slot)) == (2, 14)
    bank.step([slot])
    assert (bank.row_evals, bank.left(slot)) == (2, 12)


def test_a_failing_call_changes_nothing(edit_model, bank: EditBank, monkeypatch) -> None:
    slots = [bank.add(inputs_of(edit_model, edit)) for edit in EDITS[1:3]]
    bank.step(slots)
    before = {name: value.clone() for name, value in bank._tensors.items()}

    def fail(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(bank, "unet", type("Unet", (), {"device": "cpu", "dtype": torch.float32, "__call__": fail})())
        with pytest.raises(torch.OutOfMemoryError):
            bank.step(slots)
    assert all(torch.equal(value, before[name]) for name, value in bank._tensors.items())
    assert [bank.done[slot] for slot in slots] == [1, 1]


def test_outside_of_the_guidance_interval_a_step_takes_one_row() -> None:
    table = step_table({}, "euler_ancestral", 10, 7.5, 1.5, guidance_interval=(0.2, 0.7))
    assert table.rows == [1, 1, 3, 3, 3, 3, 3, 1, 1, 1]
    assert step_table({}, "euler_ancestral", 10, 7.5, 1.5).rows == [3] * 10


def test_outside_of_the_mask_the_original_s_latent_remains(edit_model, bank: EditBank) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1.0
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    masked = inputs_of(edit_model, EDITS[2], mask=mask, clean=clean)
    slots = [bank.add(masked), bank.add(inputs_of(edit_model, EDITS[2]))]
    for _ in range(4):
        bank.step(slots)
    kept, free = (taken(bank, slot) for slot in slots)
    torch.testing.assert_close(kept[:, :, :4], clean[:, :, :4])
    assert (kept[:, :, 4:] - clean[:, :, 4:]).abs().max() > 0.1
    assert not torch.equal(kept[:, :, 4:], free[:, :, 4:])  # it saw what is beside it


def test_slots_are_used_again_and_hold_nothing_of_the_edit_before(edit_model, bank: EditBank) -> None:
    first = bank.add(inputs_of(edit_model, EDITS[5]))
    for _ in range(9):
        bank.step([first])
    bank.remove(first)
    again = {bank.add(inputs_of(edit_model, EDITS[number])): number for number in (2, 1)}
    assert first in again
    for _ in range(7):
        bank.step([slot for slot in again if bank.rows_of(slot)])
    for slot, number in again.items():
        assert np.abs(edited(edit_model, taken(bank, slot)) - by_editor(edit_model, EDITS[number])).max() <= 1


def test_previews_are_the_estimate_of_the_clean_latent(edit_model, bank: EditBank) -> None:
    slot = bank.add(inputs_of(edit_model, EDITS[0]))
    bank.step([slot])
    estimate = bank.estimate(slot)
    torch.testing.assert_close(bank.latent(slot), estimate)


def test_growing_keeps_what_is_under_way(edit_model, bank: EditBank) -> None:
    slots = [bank.add(inputs_of(edit_model, edit)) for edit in itertools.islice(itertools.cycle(EDITS[1:4]), 7)]
    assert len(set(slots)) == 7
    for _ in range(4):
        bank.step([slot for slot in slots if bank.rows_of(slot)])
    assert np.abs(edited(edit_model, taken(bank, slots[1])) - by_editor(edit_model, EDITS[2])).max() <= 1


@pytest.mark.parametrize("made_before", [0, 1, 11])
def test_growth_without_memory_leaves_the_bank_as_it_was(edit_model, bank: EditBank, monkeypatch, made_before) -> None:
    slot = bank.add(inputs_of(edit_model, EDITS[4]))
    bank.step([slot])
    before, free, zeros, made = dict(bank._tensors), list(bank.free), torch.zeros, []

    def scarce(*shape: typing.Any, **named: typing.Any) -> torch.Tensor:
        if len(made) == made_before:
            raise torch.OutOfMemoryError("no room")
        made.append(zeros(*shape, **named))
        return made[-1]

    longer = inputs_of(edit_model, EDITS[1])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            bank.add(longer)
    assert all(bank._tensors[name] is tensor for name, tensor in before.items())
    assert (bank.free, len(bank)) == (free, 1)
    bank.step([slot])
    assert np.abs(edited(edit_model, taken(bank, slot)) - by_editor(edit_model, EDITS[4])).max() <= 1


def test_an_edit_that_cannot_be_taken_in_takes_no_slot(edit_model, bank: EditBank) -> None:
    inputs, free = inputs_of(edit_model, EDITS[4]), list(bank.free)
    with pytest.raises(RuntimeError):
        bank.add(dataclasses.replace(inputs, noise=inputs.noise[:, :, :3]))
    assert (bank.free, len(bank)) == (free, 0)
