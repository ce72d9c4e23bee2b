from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ip2p.config import Models
from ip2p.models.components import Clip, load_clip
from ip2p.pairs import clip_similarity
from ip2p.pairs.clip_similarity import ClipSimilarity, direction


@pytest.fixture(scope="module")
def clip(tiny_family: Path) -> Clip:
    return load_clip(Models(clip=str(tiny_family / "clip")), "cpu")


class FlatModel(torch.nn.Module):
    """Features that can be worked out by hand: an image's mean red and green, a text's two token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.texts_encoded = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))[:, :2] * self.scale

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts_encoded += len(tokens)
        return tokens.float()


def flat() -> ClipSimilarity:
    words = {"right": [1, 0], "up": [0, 2], "diagonal": [3, 3]}
    tokenizer = lambda texts: torch.tensor([words[text] for text in texts])  # noqa: E731
    return ClipSimilarity(Clip(FlatModel(), tokenizer, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "none"))


def colour(red: float, green: float) -> torch.Tensor:
    return torch.tensor([red, green, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)


@torch.no_grad()
def test_four_similarities_equal_those_worked_out_by_hand() -> None:
    originals = torch.cat([colour(0.6, 0.8), colour(1.0, 0.0)])
    edited = torch.cat([colour(0.0, 0.5), colour(0.0, 1.0)])
    sims = flat()(originals, edited, "right", "up")
    assert sims.original.tolist() == pytest.approx([0.6, 1.0], abs=1e-6)
    assert sims.edited.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert sims.image.tolist() == pytest.approx([0.8, 0.0], abs=1e-6)
    # Image change (0, 1) - (0.6, 0.8) = (-0.6, 0.2); text change (0, 1) - (1, 0) = (-1, 1).
    expected = (0.6 + 0.2) / (math.hypot(0.6, 0.2) * math.sqrt(2))
    assert sims.direction.tolist() == pytest.approx([expected, 1.0], abs=1e-6)


@torch.no_grad()
def test_unchanged_pictures_or_captions_have_direction_zero() -> None:
    similarity = flat()
    assert similarity(colour(1, 0), colour(1, 0), "right", "up").direction.item() == 0
    assert similarity(colour(1, 0), colour(0, 1), "up", "up").direction.item() == 0


@torch.no_grad()
def test_pictures_are_resized_bicubically_without_antialias_and_normalised_with_clips_numbers(clip: Clip) -> None:
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = ClipSimilarity(clip).image_features(images)
    resized = F.interpolate(images, size=(16, 16), mode="bicubic", align_corners=False, antialias=False)
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    features = clip.model.encode_image((resized - mean[:, None, None]) / std[:, None, None])
    assert (found - features / features.norm(dim=-1, keepdim=True)).abs().max() < 1e-6
    smooth = F.interpolate(images, size=(16, 16), mode="bicubic", align_corners=False, antialias=True)
    other = clip.model.encode_image((smooth - mean[:, None, None]) / std[:, None, None])
    assert (found - F.normalize(other, dim=-1)).abs().max() > 1e-3


@torch.no_grad()
def test_real_clip_scores_are_cosines_of_its_normalised_features(clip: Clip) -> None:
    generator = torch.Generator().manual_seed(0)
    originals, edited = torch.rand(2, 3, 16, 16, generator=generator), torch.rand(2, 3, 16, 16, generator=generator)
    similarity = ClipSimilarity(clip)
    sims = similarity(originals, edited, "a red boat", "a blue boat")
    images, changed = similarity.image_features(originals), similarity.image_features(edited)
    texts = F.normalize(clip.model.encode_text(clip.tokenizer(["a red boat", "a blue boat"])), dim=-1)
    assert (sims.original - images @ texts[0]).abs().max() < 1e-5
    assert (sims.edited - changed @ texts[1]).abs().max() < 1e-5
    assert (sims.image - (images * changed).sum(dim=1)).abs().max() < 1e-5
    moved = F.normalize(changed - images, dim=-1) @ F.normalize(texts[1] - texts[0], dim=-1)
    assert (sims.direction - moved).abs().max() < 1e-5


@torch.no_grad()
def test_a_text_is_encoded_once_and_only_a_bounded_number_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_similarity, "REMEMBERED_TEXTS", 2)
    similarity = flat()
    for text in ("right", "up", "right", "up"):
        similarity.text_feature(text)
    assert similarity.model.texts_encoded == 2
    for text in ("diagonal", "up", "right"):
        similarity.text_feature(text)
    assert similarity.model.texts_encoded == 4
    assert len(similarity._texts) == 2


@torch.no_grad()
def test_a_texts_bits_do_not_depend_on_what_was_asked_before(clip: Clip) -> None:
    asked_before, fresh = ClipSimilarity(clip), ClipSimilarity(clip)
    asked_before.text_feature("a blue castle on the sand")
    assert torch.equal(asked_before.text_feature("a red boat"), fresh.text_feature("a red boat"))


def test_pictures_that_did_not_change_go_nowhere_whatever_their_roundings_say():
    change = torch.tensor([[1e-6, -1e-6, 0.0], [0.1, 0.0, 0.0]])
    text_change = torch.tensor([[1.0, 0.0, 0.0]])
    assert direction(change, text_change).tolist() == [0.0, 1.0]
