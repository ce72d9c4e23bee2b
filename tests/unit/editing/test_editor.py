"""Many edits in one call, each as if it were alone; and the same as diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.editing.editor import Editor, image_latents
from ip2p.errors import CheckpointError, InputError
from ip2p.models.coding import latents_of

INSTRUCTIONS = ["make it night", "turn it into a castle", "add a moon"]


@pytest.fixture
def editor(edit_model) -> Editor:
    return Editor(edit_model)


def far_apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_sizes_come_from_the_model(editor):
    assert (editor.multiple, editor.resolution) == (4, 16)  # a VAE that halves once, a UNet of two levels


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_batch_equals_each_edit_alone(editor, pictures, sampler):
    own = {"seed": [5, 6, 5], "guidance_scale": [7.5, 3.0, 2.0], "image_guidance_scale": [1.5, 1.0, 2.0],
           "negative_prompt": ["", "snow", ""]}  # fmt: skip
    together = editor.edit(pictures, INSTRUCTIONS, steps=4, sampler=sampler, **own)
    assert editor.row_evals == 4 * (3 + 2 + 2)
    for place in range(3):
        mine = {name: values[place] for name, values in own.items()}
        alone = editor.edit([pictures[place]], [INSTRUCTIONS[place]], steps=4, sampler=sampler, **mine)
        assert far_apart(together[place], alone[0]) <= 1


def test_pictures_of_different_sizes_share_a_call_to_the_editor(editor):
    rng = np.random.default_rng(3)
    mixed = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((16, 16), (9, 16), (20, 20), (32, 16))]
    together = editor.edit(mixed, ["make it night"] * 4, steps=2, seed=[1, 2, 3, 4])
    assert [picture.shape for picture in together] == [(16, 16, 3), (12, 20, 3), (16, 16, 3), (16, 8, 3)]
    for place, picture in enumerate(mixed):
        assert far_apart(together[place], editor.edit([picture], ["make it night"], steps=2, seed=place + 1)[0]) <= 1


def test_calls_are_bounded_and_give_the_same_pictures(edit_model, pictures):
    seen = []
    small, large = Editor(edit_model, edits_per_call=2), Editor(edit_model)
    settings = {"steps": 2, "seed": np.array([1, 2, 3])}
    halves = small.edit(pictures, INSTRUCTIONS, on_step=lambda: seen.append(1), **settings)
    assert len(seen) == 4  # two calls of two steps
    assert small.row_evals == 2 * 3 * 3  # no edit is in both
    assert all(
        far_apart(*pair) <= 1 for pair in zip(halves, large.edit(pictures, INSTRUCTIONS, **settings), strict=True)
    )


def test_seed_scales_instruction_and_negative_prompt_all_count(editor, pictures):
    base = {"steps": 3, "seed": 1}

    def edited(instruction: str = "make it night", **changed) -> np.ndarray:
        return editor.edit(pictures[:1], [instruction], **{**base, **changed})[0]

    plain = edited()
    assert np.array_equal(plain, edited())
    others = [edited(seed=2), edited("add snow"), edited(negative_prompt="a boat"), edited(guidance_scale=2.0),
              edited(image_guidance_scale=0.5), edited(steps=4), edited(sampler="dpmpp_2m")]  # fmt: skip
    assert all(far_apart(plain, other) > 1 for other in others)


@pytest.mark.parametrize(
    ("s_t", "s_i", "rows"), [(7.5, 1.5, 3), (7.5, 1.0, 2), (4.0, 4.0, 2), (1.0, 1.0, 1), (0, 0, 1)]
)
def test_rows_without_weight_are_not_run(editor, pictures, s_t, s_i, rows):
    editor.edit(pictures[:1], ["add a moon"], steps=2, guidance_scale=s_t, image_guidance_scale=s_i)
    assert editor.row_evals == 2 * rows


@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_empty_instruction_gives_the_resized_input_and_runs_nothing(editor, instruction):
    picture = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    resized, edited = editor.edit([picture, picture], [instruction, "make it night"], steps=1)
    assert resized.shape == edited.shape == (16, 16, 3)
    assert far_apart(resized, edited) > 1
    assert editor.row_evals == 3
    assert np.array_equal(editor.edit([picture], [instruction], restore_size=True)[0], picture)


def test_restored_result_has_the_size_of_the_input_and_is_edited_to_the_border(editor):
    picture = np.full((40, 70, 3), 100, np.uint8)
    edited = editor.edit([picture], ["make it night"], steps=2, restore_size=True)[0]
    assert edited.shape == picture.shape
    assert (edited[:, [0, -1]] != 100).any()
    assert (edited[[0, -1]] != 100).any()


def test_image_latent_is_the_mode_unscaled_unless_the_model_says_otherwise(edit_model, pictures):
    with torch.no_grad():
        unit = torch.from_numpy(pictures[0]).permute(2, 0, 1)[None] / 127.5 - 1
        mode = edit_model.vae.encode(unit).latent_dist.mode()
        scaled = dataclasses.replace(edit_model, image_latent_scaled=True)
        assert torch.equal(image_latents(edit_model, pictures[:1]), mode)
        assert torch.equal(image_latents(scaled, pictures[:1]), mode * edit_model.vae.config.scaling_factor)


def test_the_convention_reaches_the_result(edit_model, pictures):
    scaled = Editor(dataclasses.replace(edit_model, image_latent_scaled=True))
    plain = Editor(edit_model).edit(pictures[:1], ["add a moon"], steps=2)[0]
    assert far_apart(plain, scaled.edit(pictures[:1], ["add a moon"], steps=2)[0]) > 1


@pytest.mark.parametrize("steps", [2, 6])  # at 1 diffusers starts at timestep 0 and the original at 999
def test_equals_the_pipeline_of_diffusers_given_the_same_noise(edit_folder: Path, editor, pictures, steps):
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    model = editor.model
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(edit_folder / "scheduler")
    pipeline = StableDiffusionInstructPix2PixPipeline(
        model.vae, model.text_encoder, model.tokenizer, model.unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    seeds = [11, 12, 13]
    theirs = pipeline(
        INSTRUCTIONS, [Image.fromarray(picture) for picture in pictures], num_inference_steps=steps, guidance_scale=4.0,
        image_guidance_scale=1.5, negative_prompt=["snow", "", ""], output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip
    ours = editor.edit(
        pictures, INSTRUCTIONS, steps=steps, guidance_scale=4.0, seed=seeds, negative_prompt=["snow", "", ""]
    )
    assert float(np.abs(np.stack(ours) / 255 - theirs).max()) <= 1 / 255
    assert far_apart(ours[0], pictures[0]) > 20


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"steps": 0}, "steps must be at least 1"), ({"sampler": "magic"}, "unknown sampler 'magic'; known: euler"),
        ({"guidance_scale": -0.1}, "guidance_scale must be between"), ({"guidance_scale": [7.5, np.nan]}, "got nan"),
        ({"image_guidance_scale": float("inf")}, "image_guidance_scale must be between"),
        ({"seed": -1}, "seed must be"), ({"seed": [1, 2, 3]}, "3 values for 2 pictures"),
        ({"resolution": 3}, "resolution 3 is too small"), ({"resolution": 0}, "resolution 0 is too small"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_by_name(editor, pictures, settings, problem):
    with pytest.raises(InputError, match=problem):
        editor.edit(pictures[:2], ["make it night"] * 2, **{"steps": 1, **settings})
    assert editor.row_evals == 0


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 4), (1, 16, 16, 3)])
def test_arrays_that_are_no_rgb_picture_are_refused_with_their_shape(editor, shape):
    with pytest.raises(InputError, match=r"expected \(H, W, 3\), uint8"):
        editor.edit([np.zeros(shape, np.uint8)], ["make it night"])
    with pytest.raises(InputError, match="float64"):
        editor.edit([np.zeros((16, 16, 3))], ["make it night"])


def test_an_answer_that_is_not_finite_is_refused_with_the_remedy(edit_model, pictures):
    class Broken(torch.nn.Module):
        config, dtype, device = edit_model.unet.config, edit_model.unet.dtype, edit_model.unet.device

        def forward(self, rows, timestep, encoder_hidden_states):
            return edit_model.unet(rows * float("nan"), timestep, encoder_hidden_states=encoder_hidden_states)

    with pytest.raises(CheckpointError, match=r"NaN or Inf as torch\.float32; load it as"):
        Editor(dataclasses.replace(edit_model, unet=Broken())).edit(pictures[:1], ["make it night"], steps=1)


def test_no_pictures_are_no_work(editor):
    assert editor.edit([], []) == []


def test_latents_of_a_picture_do_not_depend_on_the_others(edit_model, pictures):
    with torch.no_grad():
        assert torch.equal(latents_of(edit_model.vae, pictures)[1], latents_of(edit_model.vae, pictures[1:2])[0])
