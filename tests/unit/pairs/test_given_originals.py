"""Edits of given originals: the original is kept to the bit, and what the texts leave alone stays."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sampling import GUIDANCE, SEEDS, SETTINGS, SHAPE, STEPS, THRESHOLDS, UNET, UNET64, one, texts
from tiny_family import build_tiny_family

from ip2p.config import load_recipe
from ip2p.errors import StorageError
from ip2p.images import decode_image, square
from ip2p.pairs import painter as module
from ip2p.pairs.given_originals import edit_given
from ip2p.pairs.painter import PaintPairs
from ip2p.pairs.sampling import sample_pairs

ORIGINALS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def edited(
    unet=UNET64, pair_texts=None, originals=ORIGINALS, seeds=SEEDS, thresholds=THRESHOLDS, mode="self", skip=0.0
):
    settings = dataclasses.replace(SETTINGS, p2p_mode=mode, skip=skip)
    guidance = GUIDANCE[: len(seeds)]
    return sample_pairs(unet, pair_texts or texts(), seeds, thresholds, guidance, settings, originals)


def test_the_original_comes_out_as_it_went_in_and_the_edited_one_differs() -> None:
    latents, row_evals = edited()
    assert torch.equal(latents[:, 0], ORIGINALS)
    assert (latents[:, 1] - ORIGINALS).abs().amax(dim=(1, 2, 3)).min() > 0.05
    assert row_evals == 4 * 3 * STEPS


@pytest.mark.parametrize("mode", ["off", "self", "cross"])
def test_an_edit_to_the_same_text_gives_the_original_back(mode: str) -> None:
    latents, _ = edited(pair_texts=texts(same=True), mode=mode)
    assert (latents[:, 1] - ORIGINALS).abs().max() < 1e-9


def test_a_pair_does_not_depend_on_its_neighbours() -> None:
    together, _ = edited()
    alone, _ = edited(
        pair_texts=one(texts(), 0), originals=ORIGINALS[:1], seeds=SEEDS[:1], thresholds=THRESHOLDS[:1]
    )  # fmt: skip
    assert (together[:1] - alone).abs().max() < 1e-9


def test_the_edited_image_takes_what_each_step_of_the_original_lacks() -> None:
    """Two steps by hand; the denoiser says x / 2 of the original and x / 4 + 7 of the edited image."""
    draws = iter([torch.full((1, 1, 1, 1, 1), value) for value in (0.5, -1.0)])

    def denoise(latents: torch.Tensor, step: int) -> torch.Tensor:
        return torch.cat([latents[:, :1] / 2, latents[:, 1:] / 4 + 7], dim=1)

    found = edit_given(denoise, torch.full((1, 1, 1, 1), 3.0), [4.0, 2.0, 0.0], lambda: next(draws))
    start, on_its_way = 3 + 4 * 0.5, 3 + 2 * -1.0
    mean = start / 2 + (start - start / 2) / 4
    clean = start / 4 + 7
    edited_mean = clean + (start - clean) / 4
    between = edited_mean + on_its_way - mean
    assert found.flatten().tolist() == pytest.approx([3.0, between / 4 + 7 + 3.0 - on_its_way / 2])


def test_skipped_steps_are_not_run_and_bring_the_edit_nearer_to_the_original() -> None:
    far, _ = edited()
    near, row_evals = edited(skip=0.5)
    assert row_evals == 4 * 3 * (STEPS - 3)
    assert torch.equal(near[:, 0], ORIGINALS)
    distances = [(latents[:, 1] - ORIGINALS).abs().mean() for latents in (near, far)]
    assert 0.01 < distances[0] < 0.8 * distances[1]


def test_skipping_starts_at_the_noise_of_the_first_step_that_is_taken() -> None:
    seen: list[tuple[int, float]] = []

    def denoise(latents: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((step, float(latents[0, 0, 0, 0, 0])))
        return latents

    ones = torch.ones(1, 1, 1, 1, 1)
    edit_given(denoise, torch.zeros(1, 1, 1, 1), [8.0, 4.0, 2.0, 0.0], lambda: ones, first=1)
    assert seen == [(1, 4.0), (2, 2.0)]


def test_float32_calls_stay_float32() -> None:
    latents, _ = edited(UNET)
    assert latents.dtype == torch.float32


# ---- the stage


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> PaintPairs:
    family = tmp_path_factory.mktemp("family")
    build_tiny_family(family)
    overrides = (
        f"models.text_to_image={family / 'text_to_image'}", f"models.clip={family / 'clip'}", "pairs.original=given",
        "pairs.resolution=16", "pairs.steps=3", "pairs.candidates=2", "pairs.candidates_per_call=2",
        *(f"filter.min_{name}=-1" for name in ("image", "direction", "original", "edited")),
    )  # fmt: skip
    return PaintPairs(load_recipe("postcard", overrides), "cpu")


def row_of(place: Path) -> dict[str, str]:
    return {
        "prompt_id": "a",
        "caption": "a red boat",
        "edited_caption": "a blue boat",
        "status": "",
        "picture": str(place),
    }


def picture_in(folder: Path, width: int = 24, height: int = 16, seed: int = 0) -> Path:
    path = folder / f"{width}x{height}-{seed}.png"
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_stored_original_is_the_given_picture_cropped_in_the_middle(painter: PaintPairs, tmp_path: Path) -> None:
    path = picture_in(tmp_path)
    row = painter.paint_row(row_of(path))
    assert (row["status"], row["error"]) == ("accepted", "")
    assert len(row["pairs"]) == 2
    given = decode_image(path.read_bytes())[:, 4:20]
    for pair in row["pairs"]:
        assert np.array_equal(decode_image(pair["original_image"]), given)
        assert not np.array_equal(decode_image(pair["edited_image"]), given)
    images = torch.from_numpy(np.array(given)).permute(2, 0, 1)[None] / 255.0
    sims = painter.similarity(images, images, "a red boat", "a blue boat")
    assert row["pairs"][0]["sim_original"] == pytest.approx(float(sims.original), abs=1e-6)


def test_the_latents_are_the_modes_of_the_given_pictures_shifted_and_scaled(painter: PaintPairs) -> None:
    own = copy.copy(painter)
    vae = type(painter.model.vae).from_config({**painter.model.vae.config, "scaling_factor": 0.5, "shift_factor": 0.25})
    vae.load_state_dict(painter.model.vae.state_dict())
    own.model = dataclasses.replace(painter.model, vae=vae.eval())
    pixels = np.full((16, 16, 3), 200, np.uint8)
    with torch.inference_mode():
        mode = vae.encode(torch.full((1, 3, 16, 16), 200 / 127.5 - 1)).latent_dist.mode()
        assert torch.allclose(own._latents_of(pixels), (mode - 0.25) * 0.5, atol=1e-6)


def test_pairs_of_other_pictures_have_other_ids_and_those_of_the_same_the_same(painter, tmp_path: Path) -> None:
    first, again, other = (
        painter.paint_row(row_of(picture_in(tmp_path, seed=seed))) for seed in (1, 1, 2)
    )  # fmt: skip
    assert first["pairs"] == again["pairs"]
    ids = [{pair["pair_id"] for pair in row["pairs"]} for row in (first, other)]
    assert not ids[0] & ids[1]


def test_the_recipe_says_how_many_steps_are_skipped_and_the_ids_tell(painter: PaintPairs, tmp_path: Path) -> None:
    path = picture_in(tmp_path)
    recipe = dataclasses.replace(painter.recipe, pairs=dataclasses.replace(painter.recipe.pairs, skip=1 / 3))
    skipping = PaintPairs(recipe, "cpu").paint_row(row_of(path))
    taking_all = painter.paint_row(row_of(path))
    assert (skipping["row_evals"], taking_all["row_evals"]) == (4 * 2 * 2, 4 * 2 * 3)
    assert not {p["pair_id"] for p in skipping["pairs"]} & {p["pair_id"] for p in taking_all["pairs"]}


def test_a_picture_that_is_not_there_or_is_none_costs_its_own_row_and_is_named(painter, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture_in(tmp_path).read_bytes()[:60])
    for path in (tmp_path / "gone.png", broken):
        row = painter.paint_row(row_of(path))
        assert (row["status"], row["pairs"]) == ("error", [])
        assert str(path) in row["error"]


@pytest.mark.parametrize("kind", ["away", "refused", "other"])
def test_a_store_at_fault_is_no_prompts_error(painter: PaintPairs, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fails(uri: str) -> np.ndarray:
        raise StorageError(f"{uri}: no answer", kind)

    monkeypatch.setattr(module, "read_picture", fails)
    with pytest.raises(StorageError, match="no answer"):
        painter.paint_row(row_of(Path("x.png")))


def test_a_square_is_cut_from_the_longer_side_and_stretched_nowhere() -> None:
    pixels = np.arange(2 * 6 * 3, dtype=np.uint8).reshape(2, 6, 3)
    assert np.array_equal(square(pixels, 2), pixels[:, 2:4])
    assert np.array_equal(square(pixels, 2, 0.0), pixels[:, :2])
    assert np.array_equal(square(pixels, 2, 1.0), pixels[:, 4:])
    assert np.array_equal(square(pixels.transpose(1, 0, 2), 2), pixels.transpose(1, 0, 2)[2:4])
    assert square(pixels, 8).shape == (8, 8, 3)
