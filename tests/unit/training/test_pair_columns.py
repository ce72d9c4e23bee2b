from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ip2p.dataset.tables import image_cell
from ip2p.errors import DatasetError, RecipeError
from ip2p.images import decode_image, encode_image
from ip2p.models.components import TextToImage
from ip2p.training.encoding import PairEncoder, square_pair
from ip2p.training.pair_columns import PictureRows, encode_pictures, may_mirror
from ip2p.training.pair_index import list_pairs, read_shard_rows

NO_FLIP = np.zeros(3, bool)


def posterior(encoder: PairEncoder, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        latent = encoder.vae.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1.0).latent_dist
    return latent.mode()[0], latent.std[0]


def test_rows_hold_the_posteriors_and_the_texts_of_the_pairs_asked_for(run_uri: str, encoder: PairEncoder) -> None:
    shards = list_pairs([run_uri])
    records = [record for shard in shards for record in read_shard_rows(shard)]
    indices = np.array([7, 0, 4])
    columns = PictureRows(shards, encoder, 16).rows(indices, NO_FLIP)
    for place, index in enumerate(indices):
        original, edited = (decode_image(records[index][name]["bytes"]) for name in ("original_image", "edited_image"))
        mean, std = posterior(encoder, edited)
        assert torch.allclose(columns.edited_mean[place], mean, atol=1e-5)
        assert torch.allclose(columns.edited_std[place], std, atol=1e-5)
        assert torch.allclose(columns.original_mode[place], posterior(encoder, original)[0], atol=1e-5)
        text = encoder.texts([records[index]["instruction"]])[0]
        assert torch.allclose(columns.text_states[place], text, atol=1e-5)
    assert not torch.allclose(columns.edited_mean, columns.original_mode, atol=1e-3)


def test_both_pictures_are_mirrored_but_not_where_a_text_names_a_side(run_uri: str, encoder: PairEncoder) -> None:
    records = [record for shard in list_pairs([run_uri]) for record in read_shard_rows(shard)]
    sided = next(record for record in records if "left" in record["instruction"])
    free = next(record for record in records if may_mirror(record))
    edited_mean, _, original_mode = encode_pictures([free, sided], np.array([True, True]), encoder, 16)
    for name, latents in (("edited_image", edited_mean), ("original_image", original_mode)):
        turned = posterior(encoder, decode_image(free[name]["bytes"])[:, ::-1])[0]
        straight = posterior(encoder, decode_image(sided[name]["bytes"]))[0]
        assert torch.allclose(latents[0], turned, atol=1e-5)
        assert torch.allclose(latents[1], straight, atol=1e-5)
        assert not torch.allclose(latents[0], turned.flip(-1), atol=1e-3)


@pytest.mark.parametrize("column", ["instruction", "caption", "edited_caption"])
def test_a_side_in_any_of_the_three_texts_forbids_a_flip(column: str) -> None:
    record = {"instruction": "a", "caption": "b", "edited_caption": "c"}
    assert may_mirror(record)
    assert not may_mirror({**record, column: "to the left"})


def test_text_states_are_those_of_stable_diffusion_s_conditioning(model: TextToImage, encoder: PairEncoder) -> None:
    states = encoder.texts(["a red boat", "night", "a red boat"])
    tokens = model.tokenizer(["night"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.text_encoder(tokens).last_hidden_state[0]
    assert states.shape == (3, 77, 32)
    assert torch.allclose(states[1], expected, atol=1e-5)
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("size", [(16, 40), (40, 16), (48, 20)])
def test_a_long_picture_is_cropped_at_one_place_for_both_and_never_stretched(size: tuple[int, int]) -> None:
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    original = np.stack([rows * 4, columns * 4, rows * 0], axis=-1).astype(np.uint8)
    edited = np.stack([rows * 4, columns * 4, rows * 0 + 200], axis=-1).astype(np.uint8)
    side = min(size)
    one, two = square_pair(encode_image(original), encode_image(edited), "pair7", side)
    assert one.shape == (side, side, 3)
    assert np.array_equal(one[..., :2], two[..., :2])
    top, left = one[0, 0, 0] // 4, one[0, 0, 1] // 4
    assert np.array_equal(one, original[top : top + side, left : left + side])


@pytest.mark.parametrize("upright", [False, True])
def test_the_place_of_the_crop_belongs_to_the_pair(upright: bool) -> None:
    wide = np.tile(np.arange(64) * 4, (16, 1)).astype(np.uint8)
    data = encode_image(np.stack([wide.T if upright else wide] * 3, axis=-1))
    crops = [square_pair(data, data, f"pair{number}", 16)[0] for number in (0, 1, 2, 0)]
    assert np.array_equal(crops[0], crops[3])
    assert len({crop.tobytes() for crop in crops}) == 3


def test_pictures_of_another_size_are_resized(build_run: Callable[..., str], encoder: PairEncoder) -> None:
    uri = build_run(range(2), size=(24, 40))
    columns = PictureRows(list_pairs([uri]), encoder, 16).rows(np.array([0, 1]), NO_FLIP[:2])
    assert columns.edited_mean.shape == (2, 4, 8, 8)


def test_a_picture_that_cannot_be_decoded_is_named(run_uri: str, encoder: PairEncoder) -> None:
    record = read_shard_rows(list_pairs([run_uri])[0])[0]
    record["edited_image"] = image_cell(record["edited_image"]["bytes"][:40])
    with pytest.raises(DatasetError, match=r"pair pair0000: a picture cannot be decoded .*verify"):
        encode_pictures([record], np.array([False]), encoder, 16)


def test_a_resolution_that_the_vae_cannot_halve_is_refused(encoder: PairEncoder) -> None:
    with pytest.raises(RecipeError, match="resolution 17 is not a multiple of 2"):
        encoder.latent_shape(17)


def test_few_shards_are_held_in_memory(run_uri: str, encoder: PairEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from ip2p.training import pair_columns

    asked: list[str] = []
    whole = pair_columns.rows_table
    monkeypatch.setattr(pair_columns, "rows_table", lambda shard: asked.append(shard.name) or whole(shard))
    source = PictureRows(list_pairs([run_uri]), encoder, 16, budget_bytes=1)
    for index in (0, 1, 8, 0):
        source.rows(np.array([index]), NO_FLIP[:1])
    assert len(asked) == 3
