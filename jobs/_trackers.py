"""Metrics to TensorBoard, Weights & Biases, MLflow and the like: accelerate's trackers, fed by the driver alone."""

from __future__ import annotations

import dataclasses
import io
import math
import typing
from pathlib import Path

from ip2p.errors import InputError
from ip2p.storage import Folder, LocalFolder
from ip2p.training.recipe import TrainingRecipe

LOCAL_LOGS = Path("out") / "tensorboard"
"""Where a tracker that writes files puts them when the run's folder is in a bucket."""


class Trackers:
    """``names``: comma-separated names of accelerate's trackers, or none. Raises InputError for one that is not there.

    Use it as a context; ``log`` takes the metrics that a training step reports.
    """

    def __init__(self, names: str, folder: Folder, recipe: TrainingRecipe):
        self.folder = folder
        self.trackers = [_tracker(name, folder) for name in wanted_trackers(names)]
        for tracker in self.trackers:
            if tracker.name != "tensorboard":  # its table of settings would be an empty chart
                tracker.store_init_configuration(dataclasses.asdict(recipe))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def log(self, metrics: dict[str, typing.Any]) -> None:
        step, values = metrics["step"], dict(scalars(metrics))
        for tracker in self.trackers:
            tracker.log(values, step=step)
            if "grid" in metrics and hasattr(tracker, "log_images"):  # some have no pictures
                tracker.log_images({"edits": self._picture(metrics["grid"])}, step=step, **_as_rows(tracker))

    def _picture(self, name: str) -> typing.Any:
        import numpy as np
        from PIL import Image

        with Image.open(io.BytesIO(self.folder.read(name))) as picture:
            return np.asarray(picture.convert("RGB"))[None]


def wanted_trackers(names: str) -> list[str]:
    """The trackers that ``names`` asks for. Raises InputError for one that accelerate does not know, or that lacks."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = [str(tracker.value) for tracker in get_available_trackers()]
    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--report-to {name}: known are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))} and none")
        if name not in there:
            raise InputError(f"--report-to {name}: the package is not there; install it, or --report-to none")
    return wanted


def scalars(metrics: dict[str, typing.Any]) -> typing.Iterator[tuple[str, float]]:
    """Numbers of ``metrics`` under the names of their charts; a band without samples has none."""
    for name, value in metrics.items():
        if name == "step" or value is None:
            continue
        if name.endswith("by_band"):
            group = "loss_by_timestep" if name == "loss_by_band" else "held_out_by_timestep"
            width = 1000 // len(value)
            for band, loss in enumerate(value):
                if not math.isnan(loss):
                    yield f"{group}/{band * width:03d}-{(band + 1) * width - 1:03d}", loss
        elif isinstance(value, int | float):
            yield name, float(value)


def _as_rows(tracker: typing.Any) -> dict[str, str]:
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def _tracker(name: str, folder: Folder) -> typing.Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    logs = folder.root if isinstance(folder, LocalFolder) else LOCAL_LOGS
    arguments = {"logging_dir": str(logs)} if kind.requires_logging_directory else {}
    tracker = kind("tensorboard" if name == "tensorboard" else "ip2p", **arguments)
    tracker.start()
    return tracker
