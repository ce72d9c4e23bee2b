"""The paper's curve: how much of the image stays against how far the edit goes (section 4.2, figure 8).

Image similarity is CLIP's cosine of the input with the result; direction similarity that of the change of the images
with the change of the captions. One point of the curve is one image guidance scale at a fixed text guidance scale.
The released script fed its CLIP pictures in [-1, 1] where [0, 1] is expected, so its absolute numbers are its own;
here pictures are in [0, 1], as for the dataset. What edits is a function that is passed in: no model is loaded here.
"""

from __future__ import annotations

import io
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ip2p.editing.resize import crop_to
from ip2p.evaluation.bootstrap import bootstrap_mean
from ip2p.pairs.clip_similarity import ClipSimilarity
from ip2p.seeds import derive_seed
from ip2p.storage import LocalFolder

if typing.TYPE_CHECKING:
    from ip2p.models.components import Clip

IMAGE_GUIDANCE_SCALES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
"""Those of the released script, all at a text guidance scale of 7.5."""


@dataclass(frozen=True)
class Sample:
    """One picture to edit and both captions, which CLIP judges by."""

    sample_id: str
    image: np.ndarray  # (H, W, 3) uint8
    instruction: str
    caption: str
    edited_caption: str


class Edit(typing.Protocol):
    """``Editor.edit`` with its other settings bound, or whatever else edits n pictures."""

    def __call__(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        *,
        seed: Sequence[int],
        guidance_scale: float,
        image_guidance_scale: float,
    ) -> list[np.ndarray]: ...


def measure_trade_off(
    edit: Edit,
    clip: Clip,
    samples: Sequence[Sample],
    image_guidance_scales: Sequence[float] = IMAGE_GUIDANCE_SCALES,
    guidance_scales: Sequence[float] = (7.5,),
    seed: int = 0,
    samples_per_call: int = 16,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, typing.Any]]:
    """One record for each sample at each point of the grid s_T x s_I, point by point.

    A sample's noise is the same at every point. A record has sample_id, seed, guidance_scale, image_guidance_scale,
    sim_image, sim_direction and sim_edited (result with edited caption), cosines in [-1, 1].
    """
    similarity = ClipSimilarity(clip)
    grid = [(s_t, s_i) for s_t in guidance_scales for s_i in image_guidance_scales]
    records = []
    for s_t, s_i in grid:
        for start in range(0, len(samples), samples_per_call):
            part = samples[start : start + samples_per_call]
            records += _measured(edit, similarity, part, s_t, s_i, seed)
            if progress is not None:
                progress(len(part))
    return records


def _measured(
    edit: Edit, similarity: ClipSimilarity, samples: Sequence[Sample], s_t: float, s_i: float, seed: int
) -> list[dict[str, typing.Any]]:
    seeds = [derive_seed("evaluation", seed, sample.sample_id) for sample in samples]
    edited = edit(
        [sample.image for sample in samples],
        [sample.instruction for sample in samples],
        seed=seeds,
        guidance_scale=s_t,
        image_guidance_scale=s_i,
    )
    where = {"guidance_scale": s_t, "image_guidance_scale": s_i}
    return [
        {"sample_id": sample.sample_id, "seed": one, **where, **judge_by_clip(similarity, sample, picture)}
        for sample, one, picture in zip(samples, seeds, edited, strict=True)
    ]


@torch.inference_mode()
def judge_by_clip(similarity: ClipSimilarity, sample: Sample, edited: np.ndarray) -> dict[str, float]:
    """sim_image, sim_direction and sim_edited of one result ``(h, w, 3)`` uint8.

    The input is brought to the result's size first: CLIP sees other detail in a picture of another size.
    """
    size = (edited.shape[1], edited.shape[0])
    original = sample.image if sample.image.shape == edited.shape else crop_to(sample.image, size).pixels
    scores = similarity(as_unit(original), as_unit(edited), sample.caption, sample.edited_caption)
    return {
        "sim_image": float(scores.image), "sim_direction": float(scores.direction), "sim_edited": float(scores.edited),
    }  # fmt: skip


def as_unit(picture: np.ndarray) -> torch.Tensor:
    """``(H, W, 3)`` uint8 to ``(1, 3, H, W)`` float32 in [0, 1], as CLIP's similarities are defined for."""
    if picture.dtype != np.uint8:
        raise ValueError(f"picture of {picture.dtype}, expected uint8")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def curve(records: Iterable[dict[str, typing.Any]], resamples: int = 1000) -> list[dict[str, typing.Any]]:
    """One point for each (s_T, s_I), in order: count, and of each similarity mean, low and high (95 % bootstrap)."""
    points: dict[tuple[float, float], list[dict[str, typing.Any]]] = {}
    for record in records:
        points.setdefault((record["guidance_scale"], record["image_guidance_scale"]), []).append(record)
    found = []
    for (s_t, s_i), mine in sorted(points.items()):
        mine = sorted(mine, key=lambda record: record["sample_id"])
        point: dict[str, typing.Any] = {"guidance_scale": s_t, "image_guidance_scale": s_i, "count": len(mine)}
        for name in ("sim_image", "sim_direction", "sim_edited"):
            point[name] = bootstrap_mean([record[name] for record in mine], resamples)._asdict()
        found.append(point)
    return found


def write_records(records: Sequence[dict[str, typing.Any]], path: Path) -> None:
    """Write the records as one Parquet file, which appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), buffer)
    LocalFolder(path.parent).write(path.name, buffer.getvalue())


def draw_curves(curves: dict[str, list[dict[str, typing.Any]]], path: Path) -> None:
    """The paper's figure as PNG: a line for each name and s_T, a point for each s_I, bars where the mean may lie."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        for s_t in sorted({point["guidance_scale"] for point in points}):
            line = [point for point in points if point["guidance_scale"] == s_t]
            x, y = (_with_bars([point[measure] for point in line]) for measure in ("sim_direction", "sim_image"))
            axes.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], marker="o", capsize=2, label=f"{name}, s_T = {s_t:g}")
            for point, at in zip(line, zip(x[0], y[0], strict=True), strict=True):
                axes.annotate(f"{point['image_guidance_scale']:g}", at, textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel("CLIP text-image direction similarity")
    axes.set_ylabel("CLIP image similarity")
    axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    LocalFolder(path.parent).write(path.name, buffer.getvalue())


def _with_bars(bands: Sequence[dict[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far below and above them the bars reach."""
    means = [band["mean"] for band in bands]
    # A bootstrap's quantiles may miss the mean by a rounding where all values are equal.
    below = [max(0.0, band["mean"] - band["low"]) for band in bands]
    above = [max(0.0, band["high"] - band["mean"]) for band in bands]
    return means, [below, above]
