from __future__ import annotations

import pytest
import torch
from tiny_family import TEXT_WIDTH, tiny_unet

from ip2p.errors import CheckpointError
from ip2p.models.widening import widen


@pytest.mark.parametrize("seed", [1, 2])
def test_a_widened_unet_answers_exactly_as_its_base_for_any_image(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    noisy, image = (torch.randn((2, 4, 8, 8), generator=random) * scale for scale in (1.0, 30.0))
    text = torch.randn((2, 5, TEXT_WIDTH), generator=random)
    timesteps = torch.tensor([3, 977])
    wide = widen(tiny_unet())
    with torch.no_grad():
        expected = tiny_unet()(noisy, timesteps, text).sample
        found = wide(torch.cat([noisy, image], dim=1), timesteps, text).sample
    assert torch.equal(found, expected)
    assert expected.abs().mean() > 0.01


def test_new_channels_weigh_nothing_and_the_bias_is_the_base_s() -> None:
    base, wide = tiny_unet(), widen(tiny_unet())
    assert wide.conv_in.weight.shape == (16, 8, 3, 3)
    assert torch.equal(wide.conv_in.weight[:, :4], base.conv_in.weight)
    assert not wide.conv_in.weight[:, 4:].any()
    assert torch.equal(wide.conv_in.bias, base.conv_in.bias)
    assert base.conv_in.bias.abs().max() > 0.01


def test_the_new_width_is_in_the_config_that_gets_saved(tmp_path) -> None:
    from diffusers import UNet2DConditionModel

    widen(tiny_unet()).save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert (again.config.in_channels, again.conv_in.in_channels) == (8, 8)


def test_an_edit_model_passes_through_unchanged() -> None:
    unet = tiny_unet(in_channels=8)
    before = unet.conv_in.weight.clone()
    assert widen(unet) is unet
    assert torch.equal(unet.conv_in.weight, before)


def test_dtype_and_trainability_stay_as_they_were() -> None:
    assert widen(tiny_unet().half()).conv_in.weight.dtype == torch.float16
    assert not widen(tiny_unet()).conv_in.weight.requires_grad
    assert widen(tiny_unet().requires_grad_(True)).conv_in.bias.requires_grad


def test_a_unet_of_another_width_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"found 9 input channels, expected 4 .* or 8 .*start from"):
        widen(tiny_unet(in_channels=9))
