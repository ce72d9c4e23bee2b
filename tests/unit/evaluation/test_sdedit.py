"""SDEdit: from the autoencoder's picture at strength 0 to the text-to-image model's at strength 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.config import Models
from ip2p.errors import InputError
from ip2p.evaluation.sdedit import sdedit
from ip2p.models.components import load_text_to_image
from ip2p.pairs.sigmas import sigma_table

CAPTIONS = ["a red boat on water", "a blue castle on the snow"]


@pytest.fixture(scope="module")
def model(tiny_family: Path):
    return load_text_to_image(Models(text_to_image=str(tiny_family / "text_to_image")), "cpu")


@pytest.fixture
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8))


def far_apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


class Counted(torch.nn.Module):
    """A UNet that remembers at which timesteps and on how many rows it was run."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.calls = unet, unet.config, []
        self.dtype, self.device, self.first = unet.dtype, unet.device, None

    def forward(self, rows, timestep, encoder_hidden_states):
        self.first = rows if self.first is None else self.first
        self.calls.append((len(rows), round(float(timestep), 2)))
        return self.unet(rows, timestep, encoder_hidden_states=encoder_hidden_states)


def counted(model):
    from dataclasses import replace

    return replace(model, unet=Counted(model.unet))


def test_strength_zero_is_what_the_autoencoder_sees(model, pictures):
    watched = counted(model)
    found = sdedit(watched, pictures, CAPTIONS, seed=[1, 2], strength=0.0, steps=4)
    assert watched.unet.calls == []
    with torch.no_grad():
        unit = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        seen = model.vae.decode(model.vae.encode(unit).latent_dist.mode()).sample
    expected = ((seen / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert far_apart(np.stack(found), expected) <= 1


def test_strength_is_the_share_of_the_steps_that_is_run_the_last_ones(model, pictures):
    watched = counted(model)
    sdedit(watched, pictures, CAPTIONS, seed=[1, 2], strength=0.5, steps=4)
    assert watched.unet.calls == [(4, 333.0), (4, 0.0)]  # two rows a picture, as guidance has it


def test_start_is_the_pictures_latent_with_as_much_noise_as_its_step_has(model, pictures):
    watched = counted(model)
    sdedit(watched, pictures, CAPTIONS, seed=[1, 2], strength=0.5, steps=4)
    sigma = float(sigma_table(model.scheduler_config, 4)[2])
    with torch.no_grad():
        unit = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        clean = model.vae.encode(unit).latent_dist.mode() * model.vae.config.scaling_factor
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    expected = (clean + sigma * noise) / (sigma**2 + 1) ** 0.5
    given = watched.unet.first
    assert torch.allclose(given[[0, 2]], expected, atol=1e-5)
    assert torch.equal(given[[0, 2]], given[[1, 3]])


def test_guidance_of_one_runs_a_single_row(model, pictures):
    watched = counted(model)
    sdedit(watched, pictures, CAPTIONS, seed=[1, 2], strength=1.0, steps=2, guidance_scale=1.0)
    assert [rows for rows, _ in watched.unet.calls] == [2, 2]


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_batch_equals_each_picture_alone_and_follows_its_caption_and_seed(model, pictures, sampler):
    settings = {"strength": 0.8, "steps": 5, "sampler": sampler}
    together = sdedit(model, pictures, CAPTIONS, seed=[1, 2], **settings)
    alone = sdedit(model, pictures[1:], CAPTIONS[1:], seed=[2], **settings)
    assert far_apart(together[1], alone[0]) <= 1
    assert far_apart(sdedit(model, pictures[1:], CAPTIONS[:1], seed=[2], **settings)[0], alone[0]) > 1
    assert far_apart(sdedit(model, pictures[1:], CAPTIONS[1:], seed=[3], **settings)[0], alone[0]) > 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_out_of_range_is_refused(model, pictures, strength):
    with pytest.raises(InputError, match="strength must be between 0 and 1"):
        sdedit(model, pictures, CAPTIONS, seed=[1, 2], strength=strength)
