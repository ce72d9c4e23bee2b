"""The attribute reader: a small classifier that says what any 64-pixel picture shows. For evaluation only.

Nothing in pair generation or training may consult it: it is the exam, not the teacher. Besides the named attributes
it reads the layout (horizon, the object's place and size), so that "and nothing else changed" covers what captions
do not say.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ip2p.postcards.scene import COLOURS, EXTRAS, GROUNDS, OBJECTS, SKIES, STYLES, Scene

CLASSES = {"object": OBJECTS, "colour": COLOURS, "ground": GROUNDS, "sky": SKIES, "style": STYLES}
LAYOUT = ("horizon", "object_x", "object_size")
# How far a layout may be read apart before it counts as changed: about twice the reader's own error on drawings.
LAYOUT_TOLERANCE = {"horizon": 0.06, "object_x": 0.08, "object_size": 0.10}


class AttributeReader(nn.Module):
    """``(n, 3, 64, 64)`` in [-1, 1] to logits: one group a class attribute, then extras, then three layout numbers."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if i:
                layers += [nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(names)) for name, names in CLASSES.items()})
        self.extras = nn.Linear(128, len(EXTRAS))
        self.layout = nn.Linear(128, len(LAYOUT))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(pictures)
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits | {"extras": self.extras(features), "layout": self.layout(features)}


@dataclass(frozen=True)
class Reading:
    """What the reader saw in one picture."""

    object: str
    colour: str
    ground: str
    sky: str
    style: str
    extras: tuple[str, ...]
    horizon: float
    object_x: float
    object_size: float

    def differing(self, other: Reading | Scene) -> set[str]:
        """Names of the attributes in which two pictures (or a picture and a scene) differ; extras one by one."""
        names = {name for name in CLASSES if getattr(self, name) != getattr(other, name)}
        return names | set(self.extras) ^ set(other.extras)

    def same_layout(self, other: Reading, names: tuple[str, ...] = LAYOUT) -> bool:
        """Whether the layout numbers in ``names`` are read within LAYOUT_TOLERANCE of each other."""
        return all(abs(getattr(self, name) - getattr(other, name)) <= LAYOUT_TOLERANCE[name] for name in names)


def reader_targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class indices ``(n,)``, extras ``(n, 5)`` in {0, 1} and layout ``(n, 3)``."""
    targets = {
        name: torch.tensor([names.index(getattr(scene, name)) for scene in scenes]) for name, names in CLASSES.items()
    }
    targets["extras"] = torch.tensor([[float(extra in scene.extras) for extra in EXTRAS] for scene in scenes])
    targets["layout"] = torch.tensor([[getattr(scene.layout, name) for name in LAYOUT] for scene in scenes])
    return targets


def reader_loss(outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    classes = sum(F.cross_entropy(outputs[name], targets[name]) for name in CLASSES)
    extras = F.binary_cross_entropy_with_logits(outputs["extras"], targets["extras"])
    layout = F.l1_loss(outputs["layout"], targets["layout"])
    return classes + 5 * extras + 10 * layout


@torch.inference_mode()
def read(reader: AttributeReader, pictures: torch.Tensor, batch: int = 256) -> list[Reading]:
    """Read ``(n, 3, 64, 64)`` pictures in [-1, 1]."""
    readings = []
    for part in pictures.split(batch):
        outputs = {name: value.cpu() for name, value in reader(part).items()}
        readings += [_reading(outputs, row) for row in range(len(part))]
    return readings


def _reading(outputs: dict[str, torch.Tensor], row: int) -> Reading:
    classes = {name: names[int(outputs[name][row].argmax())] for name, names in CLASSES.items()}
    extras = tuple(extra for extra, logit in zip(EXTRAS, outputs["extras"][row], strict=True) if logit > 0)
    horizon, object_x, object_size = (float(value) for value in outputs["layout"][row])
    return Reading(**classes, extras=tuple(sorted(extras)), horizon=horizon, object_x=object_x, object_size=object_size)


def load_reader(folder: Path) -> AttributeReader:
    """The reader from ``folder/model.safetensors``, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    reader = AttributeReader()
    reader.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in
                            load_file(folder / "model.safetensors").items()})  # fmt: skip
    return reader.eval()
