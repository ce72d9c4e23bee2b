"""From a text-to-image UNet to the edit model's: four more input channels, whose weights start at zero (section 3.2).

At step 0 the wider UNet answers exactly as its base does, whatever the image latents are. Nothing is trained here.
"""

from __future__ import annotations

import typing

import torch

from ip2p.errors import CheckpointError

EXTRA_CHANNELS = 4
"""The image latents: the posterior mode of the original image, after the four channels of the noisy edited one."""


def widen(unet: typing.Any, extra: int = EXTRA_CHANNELS) -> typing.Any:
    """Give ``unet`` (UNet2DConditionModel) ``extra`` more input channels in place, and return it.

    The new channels come last and weigh zero; the first ones and the bias are the base's. A UNet that has them already
    (an edit model, to be trained further) is returned as it is. Raises CheckpointError for any other width.
    """
    base = unet.config.out_channels
    found = unet.conv_in.in_channels
    if found == base + extra:
        return unet
    if found != base:
        raise CheckpointError(
            f"unet: found {found} input channels, expected {base} (a text-to-image UNet) or {base + extra} "
            "(an edit model); start from a model of one of these widths"
        )
    unet.conv_in = _wider(unet.conv_in, extra)
    unet.register_to_config(in_channels=base + extra)
    return unet


def _wider(narrow: torch.nn.Conv2d, extra: int) -> torch.nn.Conv2d:
    weight = narrow.weight
    wide = torch.nn.utils.skip_init(
        torch.nn.Conv2d,
        narrow.in_channels + extra,
        narrow.out_channels,
        kernel_size=narrow.kernel_size,
        stride=narrow.stride,
        padding=narrow.padding,
        bias=narrow.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : narrow.in_channels] = weight
        if narrow.bias is not None and wide.bias is not None:
            wide.bias.copy_(narrow.bias)
    return wide.requires_grad_(weight.requires_grad).train(narrow.training)
