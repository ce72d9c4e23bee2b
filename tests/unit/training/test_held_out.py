from __future__ import annotations

import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.errors import DatasetError
from ip2p.models.components import EditModel
from ip2p.training.ema import copy_into
from ip2p.training.held_out import BANDS, band_of, held_out_losses
from ip2p.training.loss import NoiseSchedule
from ip2p.training.pair_index import list_pairs
from ip2p.training.state import start_training
from jobs._ray_train import Work, look_at_held_out, source_of


class Listener:
    """A UNet that answers zero and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, sample: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> typing.Any:
        self.seen.append((sample, timesteps, text))
        return types.SimpleNamespace(sample=torch.zeros_like(sample[:, :4]))


def test_bands_are_of_a_hundred_timesteps() -> None:
    assert band_of(np.array([0, 99, 100, 550, 999])).tolist() == [0, 0, 1, 5, 9]


def test_every_pair_meets_every_band_with_nothing_dropped_or_mirrored(random_rows, schedule: NoiseSchedule) -> None:
    unet = Listener()
    losses = held_out_losses(unet, random_rows, schedule, batch=5)
    assert losses.shape == (12, BANDS)
    assert (losses > 0).all()
    for band in range(BANDS):
        looks = unet.seen[band::BANDS]
        timesteps = torch.cat([look[1] for look in looks])
        assert band_of(timesteps.numpy()).tolist() == [band] * 12
        assert timesteps.unique().numel() > 3
        assert torch.equal(torch.cat([look[0] for look in looks])[:, 4:], random_rows.columns[2])
        assert torch.equal(torch.cat([look[2] for look in looks]), random_rows.states)


def test_two_looks_are_equal_whatever_the_batch_and_the_limit(
    random_rows, schedule: NoiseSchedule, new_unet: typing.Callable[..., typing.Any]
) -> None:
    unet = new_unet(in_channels=8)
    whole = held_out_losses(unet, random_rows, schedule)
    assert np.allclose(held_out_losses(unet, random_rows, schedule, batch=5), whole, atol=1e-5)
    assert np.allclose(held_out_losses(unet, random_rows, schedule, limit=3), whole[:3], atol=1e-5)
    other = held_out_losses(new_unet(in_channels=8, seed=1), random_rows, schedule)
    assert not np.allclose(other, whole, atol=1e-3)


def test_bfloat16_is_close_to_float32_and_not_the_same(
    random_rows, schedule: NoiseSchedule, new_unet: typing.Callable[..., typing.Any]
) -> None:
    unet = new_unet(in_channels=8)
    one = held_out_losses(unet, random_rows, schedule, limit=2)
    two = held_out_losses(unet, random_rows, schedule, limit=2, precision="bfloat16")
    assert not np.array_equal(one, two)
    assert np.allclose(one, two, rtol=0.05)


def test_no_held_out_pairs_are_named(random_rows, schedule: NoiseSchedule) -> None:
    random_rows.states = random_rows.states[:0]
    with pytest.raises(DatasetError, match="no held-out pairs"):
        held_out_losses(Listener(), random_rows, schedule)


def test_a_look_is_at_the_averaged_weights_without_a_trace(
    model, new_unet, recipe, run_uri: str, schedule: NoiseSchedule, tmp_path: Path
) -> None:
    work = Work(recipe, str(tmp_path), {"val": list_pairs([run_uri], "val")}, {}, look_every=1)
    state = start_training(new_unet(), recipe)
    for average in state.ema.averages.values():
        average.mul_(0.5)
    before = {name: value.clone() for name, value in state.parameters.items()}
    base = EditModel(**vars(model))
    look = look_at_held_out(work, base, state, schedule, rank=0)
    assert look is not None
    told = look(1)
    assert state.unet.training
    assert all(torch.equal(before[name], value) for name, value in state.parameters.items())
    source = source_of(work, base, "cpu", "val")
    raw = held_out_losses(state.unet.eval(), source, schedule)
    copy_into(state.parameters, state.ema.averages)
    averaged = held_out_losses(state.unet, source, schedule)
    assert told["held_out_by_band"] == pytest.approx(averaged.mean(axis=0).tolist(), rel=1e-5)
    assert told["held_out_loss"] != pytest.approx(float(raw.mean()), rel=1e-3)
    assert (tmp_path / told["grid"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
