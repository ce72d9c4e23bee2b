from __future__ import annotations

import dataclasses
import types
import typing

import pytest
import torch

from ip2p.errors import CheckpointError
from ip2p.training.loss import NoiseSchedule, image_latents, noise_schedule, sample_losses, target_latents
from ip2p.training.pair_columns import PairColumns

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
VAE = types.SimpleNamespace(scaling_factor=0.18215)


def answering(answer: torch.Tensor, seen: list[torch.Tensor] | None = None) -> typing.Callable[..., typing.Any]:
    def forward(sample: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> typing.Any:
        if seen is not None:
            seen.append(sample)
        return types.SimpleNamespace(sample=answer)

    return forward


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheduler_of_diffusers() -> typing.Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**SD15)


def test_the_schedule_is_that_of_diffusers() -> None:
    ours = noise_schedule(SD15, VAE)
    assert torch.allclose(ours.alphas, scheduler_of_diffusers().alphas_cumprod, rtol=1e-4)
    assert (ours.prediction_type, ours.scaling_factor, ours.shift_factor) == ("epsilon", 0.18215, 0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_input_and_target_are_those_of_diffusers(prediction_type: str) -> None:
    clean, noise, image = (normals(3, 4, 8, 8, seed=seed) for seed in range(3))
    timesteps, text = torch.tensor([0, 500, 999]), normals(3, 5, 32)
    schedule = noise_schedule({**SD15, "prediction_type": prediction_type}, VAE)
    theirs = scheduler_of_diffusers()
    target = noise if prediction_type == "epsilon" else theirs.get_velocity(clean, noise, timesteps)
    seen: list[torch.Tensor] = []
    losses = sample_losses(answering(target, seen), clean, image, text, noise, timesteps, schedule)
    assert losses.shape == (3,)
    assert losses.max() < 1e-7
    assert torch.allclose(seen[0][:, :4], theirs.add_noise(clean, noise, timesteps), atol=1e-5)
    assert torch.equal(seen[0][:, 4:], image)


def test_the_loss_is_the_mean_square_of_each_sample() -> None:
    schedule = noise_schedule(SD15, VAE)
    clean = noise = image = normals(2, 4, 8, 8)
    answer = noise + torch.tensor([1.0, 3.0])[:, None, None, None]
    losses = sample_losses(answering(answer), clean, image, normals(2, 5, 32), noise, torch.tensor([5, 5]), schedule)
    assert losses.tolist() == pytest.approx([1.0, 9.0], rel=1e-5)


@pytest.fixture
def columns() -> PairColumns:
    return PairColumns(
        normals(2, 4, 8, 8), normals(2, 4, 8, 8, seed=1).abs(), normals(2, 4, 8, 8, seed=2), normals(2, 5, 32)
    )


def test_targets_are_scaled_posterior_samples_and_conditions_unscaled_modes(columns: PairColumns) -> None:
    schedule, noise = noise_schedule(SD15, VAE), normals(2, 4, 8, 8, seed=3)
    assert torch.allclose(
        target_latents(columns, noise, schedule), (columns.edited_mean + columns.edited_std * noise) * 0.18215
    )
    assert torch.equal(image_latents(columns, schedule), columns.original_mode)


def test_models_of_the_other_convention_see_scaled_modes(columns: PairColumns) -> None:
    shifted = types.SimpleNamespace(scaling_factor=1.5, shift_factor=0.1)
    schedule: NoiseSchedule = noise_schedule(SD15, shifted, image_latent_scaled=True)
    assert torch.allclose(image_latents(columns, schedule), columns.original_mode * 1.5)
    zero = torch.zeros_like(columns.edited_mean)
    assert torch.allclose(target_latents(columns, zero, schedule), (columns.edited_mean - 0.1) * 1.5)
    assert dataclasses.replace(schedule, image_latent_scaled=False).to("cpu").image_latent_scaled is False


def test_a_schedule_of_betas_that_is_not_known_is_refused() -> None:
    with pytest.raises(CheckpointError, match="beta_schedule 'squaredcos_cap_v2'"):
        noise_schedule({**SD15, "beta_schedule": "squaredcos_cap_v2"}, VAE)
