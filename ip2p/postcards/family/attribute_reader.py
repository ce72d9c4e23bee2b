"""Trains the attribute reader on drawings, blurred and speckled a little, so that it reads paintings too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ip2p.postcards.family.autoencoder import to_unit
from ip2p.postcards.family.drawings import Drawings
from ip2p.postcards.family.fitting import Schedule, fit
from ip2p.postcards.reader import AttributeReader, reader_loss, reader_targets


def train_reader(folder: Path, drawings: Drawings, schedule: Schedule, device: str = "cpu") -> AttributeReader:
    torch.manual_seed(4)
    reader = AttributeReader().to(memory_format=torch.channels_last).to(device)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((6, step))
        chosen = np.sort(rng.integers(len(drawings.pixels), size=schedule.batch))
        pictures = degraded(to_unit(drawings.pixels[chosen]).to(device), rng)
        targets = reader_targets([drawings.scene(int(i)) for i in chosen])
        return reader_loss(reader(pictures), {name: value.to(device) for name, value in targets.items()})

    return fit("reader", folder, reader, loss_of, schedule)


def degraded(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A random half of the batches blurred, all with a little noise and a small change of brightness."""
    if rng.random() < 0.5:
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(pictures.shape), dtype=np.float32)).to(pictures.device)
    brightness = float(rng.uniform(0.94, 1.06))
    return (pictures + 1.0) * brightness - 1.0 + float(rng.uniform(0, 0.1)) * noise


def save_reader(reader: AttributeReader, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in reader.state_dict().items()}
    save_file(state, folder / "model.safetensors")
