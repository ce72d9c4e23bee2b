"""The paper's curve, measured on a function that stands in for an editor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ip2p.config import Models
from ip2p.evaluation.trade_off import (
    Sample,
    as_unit,
    curve,
    draw_curves,
    judge_by_clip,
    measure_trade_off,
    write_records,
)
from ip2p.models.components import load_clip
from ip2p.pairs.clip_similarity import ClipSimilarity

CAPTION, EDITED = "a red boat on water", "a blue castle on the snow at night"


@pytest.fixture(scope="module")
def clip(tiny_family: Path):
    return load_clip(Models(clip=str(tiny_family / "clip")), "cpu")


@pytest.fixture
def samples() -> list[Sample]:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    return [Sample(f"s{k}", picture, f"edit {k}", CAPTION, EDITED) for k, picture in enumerate(pictures)]


class Fade:
    """Edits by fading to black, the more so the smaller the image guidance; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, instructions, *, seed, guidance_scale, image_guidance_scale):
        self.calls.append((list(instructions), list(seed), guidance_scale, image_guidance_scale))
        return [(image * min(1.0, image_guidance_scale / 2)).astype(np.uint8) for image in images]


def test_every_sample_is_edited_at_every_point_with_its_own_noise(clip, samples):
    edit = Fade()
    progress = []
    records = measure_trade_off(
        edit, clip, samples, (1.0, 2.0), (7.5, 3.0), samples_per_call=2, progress=progress.append
    )
    points = [(r["guidance_scale"], r["image_guidance_scale"]) for r in records]
    assert points == [(7.5, 1.0)] * 5 + [(7.5, 2.0)] * 5 + [(3.0, 1.0)] * 5 + [(3.0, 2.0)] * 5
    assert [call[0] for call in edit.calls[:3]] == [["edit 0", "edit 1"], ["edit 2", "edit 3"], ["edit 4"]]
    assert [call[2:] for call in edit.calls[::3]] == [(7.5, 1.0), (7.5, 2.0), (3.0, 1.0), (3.0, 2.0)]
    assert sum(progress) == 20
    seeds = {r["sample_id"]: {q["seed"] for q in records if q["sample_id"] == r["sample_id"]} for r in records}
    assert all(len(own) == 1 for own in seeds.values())
    assert len(set.union(*seeds.values())) == 5
    other = measure_trade_off(Fade(), clip, samples, (1.0,), seed=1)
    assert not {r["seed"] for r in other} & set.union(*seeds.values())


def test_similarities_are_clips_of_pictures_between_zero_and_one(clip, samples):
    sample, edited = samples[0], samples[1].image
    found = judge_by_clip(ClipSimilarity(clip), sample, edited)
    units = [torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 for picture in (sample.image, edited)]
    with torch.no_grad():
        expected = ClipSimilarity(clip)(*units, CAPTION, EDITED)
    assert found["sim_image"] == pytest.approx(float(expected.image), abs=1e-6)
    assert found["sim_direction"] == pytest.approx(float(expected.direction), abs=1e-6)
    assert found["sim_edited"] == pytest.approx(float(expected.edited), abs=1e-6)


def test_unchanged_pictures_are_alike_and_go_nowhere(clip, samples):
    found = judge_by_clip(ClipSimilarity(clip), samples[0], samples[0].image)
    assert found["sim_image"] == pytest.approx(1.0, abs=1e-6)
    assert found["sim_direction"] == pytest.approx(0.0, abs=1e-6)


def test_input_is_brought_to_the_size_of_the_result(clip, samples):
    large = Sample("large", np.kron(samples[0].image, np.ones((2, 2, 1), np.uint8)), "x", CAPTION, EDITED)
    small = judge_by_clip(ClipSimilarity(clip), samples[0], samples[0].image)
    assert judge_by_clip(ClipSimilarity(clip), large, samples[0].image)["sim_image"] == pytest.approx(
        small["sim_image"], abs=0.02
    )


def test_pictures_in_another_range_are_refused():
    assert as_unit(np.full((2, 2, 3), 255, np.uint8)).max() == 1.0
    with pytest.raises(ValueError, match="float32, expected uint8"):
        as_unit(np.zeros((2, 2, 3), np.float32))


def records_of(values: dict[tuple[float, float], list[float]]) -> list[dict]:
    return [
        {"sample_id": f"s{place}", "guidance_scale": s_t, "image_guidance_scale": s_i, "sim_image": value,
         "sim_direction": -value, "sim_edited": 0.0}
        for (s_t, s_i), mine in values.items()
        for place, value in enumerate(mine)
    ]  # fmt: skip


def test_curve_has_a_point_for_each_setting_in_order_with_means_and_bands():
    points = curve(records_of({(7.5, 1.2): [0.2, 0.4, 0.6], (7.5, 1.0): [0.8, 0.8, 0.8], (3.0, 1.0): [0.1]}))
    assert [(p["guidance_scale"], p["image_guidance_scale"], p["count"]) for p in points] == [
        (3.0, 1.0, 1), (7.5, 1.0, 3), (7.5, 1.2, 3)
    ]  # fmt: skip
    assert points[2]["sim_image"]["mean"] == pytest.approx(0.4)
    assert points[2]["sim_direction"]["mean"] == pytest.approx(-0.4)
    assert points[2]["sim_image"]["low"] < 0.4 < points[2]["sim_image"]["high"]
    assert points[1]["sim_image"]["low"] == pytest.approx(points[1]["sim_image"]["high"])


def test_curve_does_not_depend_on_the_order_of_the_records():
    records = records_of({(7.5, 1.0): np.random.default_rng(0).random(9).tolist()})
    assert curve(records) == curve(records[::-1])


def test_records_are_written_as_parquet(clip, samples, tmp_path: Path):
    records = measure_trade_off(Fade(), clip, samples, (1.0,))
    write_records(records, tmp_path / "records.parquet")
    assert pq.read_table(tmp_path / "records.parquet").to_pylist() == records
    assert [path.name for path in tmp_path.iterdir()] == ["records.parquet"]


def test_figure_is_drawn(tmp_path: Path):
    points = curve(records_of({(7.5, 1.2): [0.2, 0.4], (7.5, 1.0): [0.8, 0.8], (3.0, 1.0): [0.1, 0.2]}))
    draw_curves({"ours": points, "other": points[:1]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
