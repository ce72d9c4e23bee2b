"""The whole stage on the tiny family: 16-pixel pictures, a few steps, the real classes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_family import TEXT_WIDTH, WINDOW, clip_tokenizer

from ip2p.config import Recipe, load_recipe
from ip2p.errors import DeviceError, RecipeError
from ip2p.images import decode_image, to_uint8
from ip2p.pairs import painter as module
from ip2p.pairs.alignment import align_tokens
from ip2p.pairs.candidates import draw_candidates
from ip2p.pairs.painter import PaintPairs
from ip2p.pairs.sampling import SamplerSettings
from ip2p.schema import Candidate

CAPTION, EDITED = "a red boat on water", "a blue castle on the snow at night"
OPEN = ("filter.min_image=-1", "filter.min_direction=-1", "filter.min_original=-1", "filter.min_edited=-1")


@pytest.fixture(scope="module")
def recipe(tiny_family: Path) -> Recipe:
    """Five candidates, two a call, thresholds that all reach, two kept."""
    overrides = (
        f"models.text_to_image={tiny_family / 'text_to_image'}", f"models.clip={tiny_family / 'clip'}",
        "pairs.resolution=16", "pairs.steps=3", "pairs.candidates=5", "pairs.candidates_per_call=2",
        "filter.max_kept=2", *OPEN,
    )  # fmt: skip
    return load_recipe("postcard", overrides)


@pytest.fixture(scope="module")
def painter(recipe: Recipe) -> PaintPairs:
    """Shared, not to be changed: loading is most of a test's time."""
    return PaintPairs(recipe, "cpu")


@pytest.fixture(scope="module")
def painted_row(painter: PaintPairs) -> dict:
    return painter.paint_row(rows("a")[0])


def with_recipe(painter: PaintPairs, **sections: dict) -> PaintPairs:
    """The same loaded models under a recipe with some fields changed."""
    changed = copy.copy(painter)
    parts = {name: dataclasses.replace(getattr(painter.recipe, name), **fields) for name, fields in sections.items()}
    changed.recipe = dataclasses.replace(painter.recipe, **parts)
    return changed


def rows(*prompt_ids: str, status: str = "") -> list[dict]:
    return [
        {
            "index": k, "prompt_id": prompt_id, "caption": CAPTION, "instruction": "edit it", "edited_caption": EDITED,
            "status": status, "reason": "", "error": "",
        }
        for k, prompt_id in enumerate(prompt_ids)
    ]  # fmt: skip


def batch(*given: dict) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in given]) for name in given[0]}


def sims(row: dict, name: str = "sim_direction") -> list[float]:
    return [candidate[name] for candidate in row["candidates"]]


def test_prompt_is_accepted_with_all_scores_and_its_best_pairs(painted_row: dict, recipe: Recipe) -> None:
    assert (painted_row["status"], painted_row["reason"], painted_row["error"]) == ("accepted", "", "")
    assert painted_row["row_evals"] == 4 * 5 * 3
    drawn = [(c.seed, c.p2p_threshold, c.guidance_scale) for c in draw_candidates(recipe, "a")]
    found = painted_row["candidates"]
    assert [(c["seed"], c["p2p_threshold"], c["guidance_scale"]) for c in found] == drawn
    assert set(found[0]) == {field.name for field in dataclasses.fields(Candidate)}
    assert sorted(c["reason"] for c in found) == ["kept"] * 2 + ["over_max_kept"] * 3
    best = sorted(sims(painted_row), reverse=True)[:2]
    assert [pair["sim_direction"] for pair in painted_row["pairs"]] == best
    assert [pair["rank"] for pair in painted_row["pairs"]] == [0, 1]


def test_pairs_carry_their_numbers_and_lossless_pictures(painted_row: dict, painter: PaintPairs) -> None:
    for pair in painted_row["pairs"]:
        candidate = next(c for c in painted_row["candidates"] if c["seed"] == pair["seed"])
        assert {name: pair[name] for name in candidate if name != "reason"} == {
            name: value for name, value in candidate.items() if name != "reason"
        }
        assert set(pair) == {*candidate, "pair_id", "rank", "original_image", "edited_image"} - {"reason"}
        original, edited = decode_image(pair["original_image"]), decode_image(pair["edited_image"])
        assert original.shape == edited.shape == (16, 16, 3)
        assert pair["original_image"][:4] == b"\x89PNG"
        assert not np.array_equal(original, edited)
    assert len({pair["pair_id"] for pair in painted_row["pairs"]}) == 2


def test_scores_are_those_of_the_floats_that_the_pictures_were_rounded_from(painted_row, painter) -> None:
    pair = painted_row["pairs"][0]
    place = [c["seed"] for c in painted_row["candidates"]].index(pair["seed"])
    call = draw_candidates(painter.recipe, "a")[place // 2 * 2 : place // 2 * 2 + 2]
    with torch.inference_mode():
        latents, _ = module.sample_pairs(
            painter.model.unet,
            module._for_candidates(painter._texts(CAPTION, EDITED), len(call)),
            [c.seed for c in call],
            [c.p2p_threshold for c in call],
            [c.guidance_scale for c in call],
            painter.settings,
        )
        images = (painter.model.vae.decode(latents[place % 2] / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        sims = painter.similarity(images[:1], images[1:], CAPTION, EDITED)
    assert np.array_equal(decode_image(pair["original_image"]), to_uint8(images[0].permute(1, 2, 0).numpy()))
    assert np.array_equal(decode_image(pair["edited_image"]), to_uint8(images[1].permute(1, 2, 0).numpy()))
    assert pair["sim_direction"] == pytest.approx(float(sims.direction), abs=1e-6)
    assert pair["sim_original"] == pytest.approx(float(sims.original), abs=1e-6)
    assert pair["sim_edited"] == pytest.approx(float(sims.edited), abs=1e-6)
    assert pair["sim_image"] == pytest.approx(float(sims.image), abs=1e-6)


def token_ids(text: str) -> list[int]:
    ids = clip_tokenizer()(text)["input_ids"]
    return ids + [ids[-1]] * (WINDOW - len(ids))  # CLIP pads with its EOS


def text_state(painter: PaintPairs, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return painter.model.text_encoder(torch.tensor([token_ids(text)])).last_hidden_state[0]


def test_texts_are_the_captions_states_in_order_and_edited_tokens_aligned_to_the_captions(painter: PaintPairs) -> None:
    with torch.inference_mode():
        texts = painter._texts(CAPTION, EDITED)
    assert texts.states.shape == (1, 2, WINDOW, TEXT_WIDTH)
    assert torch.equal(texts.states[0, 0], text_state(painter, CAPTION))
    assert torch.equal(texts.states[0, 1], text_state(painter, EDITED))
    ids, edited_ids = token_ids(CAPTION), token_ids(EDITED)
    expected = align_tokens(ids, edited_ids, eos_id=ids[-1])
    (found,) = texts.alignments
    assert np.array_equal(found.share, expected.share)
    assert np.array_equal(found.own, expected.own)
    boat, castle = (clip_tokenizer()(word)["input_ids"][1] for word in ("boat", "castle"))
    assert found.share[edited_ids.index(castle), ids.index(boat)] > 0  # rows are the edited caption's


def test_guidance_starts_from_the_empty_text(painter: PaintPairs) -> None:
    with torch.inference_mode():
        null_state = painter._texts(CAPTION, EDITED).null_state
    assert torch.equal(null_state, text_state(painter, ""))


def test_captions_longer_than_the_window_are_cut_to_it(painter: PaintPairs) -> None:
    ids = painter._token_ids("a red boat " * 40)
    whole = clip_tokenizer()("a red boat " * 40, truncation=False, verbose=False)["input_ids"]
    assert ids == [*whole[: WINDOW - 1], whole[-1]]


def test_sampler_settings_are_the_recipes_and_the_models(recipe: Recipe) -> None:
    pairs = dataclasses.replace(recipe.pairs, sampler="dpmpp_2m", p2p_mode="cross", steps=7)
    painter = PaintPairs(dataclasses.replace(recipe, pairs=pairs), "cpu")
    assert painter.settings == SamplerSettings(painter.model.scheduler_config, 7, "dpmpp_2m", "cross", (4, 8, 8))


def test_latent_shape_follows_the_vaes_channels_and_halvings() -> None:
    class Sd:
        latent_channels, block_out_channels = 16, (128, 256, 512, 512)

    assert module._latent_shape(Sd, 512) == (16, 64, 64)
    with pytest.raises(RecipeError, match="516 is not a multiple of 8"):
        module._latent_shape(Sd, 516)


def test_decoding_undoes_the_vaes_own_scale_and_shift_and_stays_between_0_and_1(painter: PaintPairs) -> None:
    own = copy.copy(painter)
    vae = type(painter.model.vae).from_config({**painter.model.vae.config, "scaling_factor": 0.5, "shift_factor": 0.25})
    vae.load_state_dict(painter.model.vae.state_dict())
    own.model = dataclasses.replace(painter.model, vae=vae.eval())
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    with torch.inference_mode():
        plain = vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5
        images = own.decode(latents.double())
    assert images.dtype == torch.float32
    assert plain.min() < 0
    assert plain.max() > 1
    assert torch.equal(images, plain.clamp(0, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_stay_so_and_make_no_picture(painter: PaintPairs, value: float) -> None:
    own = copy.copy(painter)
    own.model = dataclasses.replace(painter.model, vae=copy.deepcopy(painter.model.vae))
    own.model.vae.decoder.conv_out.bias.data[0] = value
    with torch.inference_mode():
        images = own.decode(torch.zeros(2, 4, 8, 8))
    assert torch.equal(images.isfinite().all(dim=(0, 2, 3)), torch.tensor([False, True, True]))
    assert module._as_pictures(images) is None


def test_all_models_and_texts_are_on_the_device_that_was_asked_for(recipe: Recipe, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what ``auto`` looks at
    painter = PaintPairs(recipe, "meta")  # a device that every build of torch has
    model = painter.model
    modules = (model.unet, model.vae, model.text_encoder, painter.clip.model)
    assert {parameter.device.type for module in modules for parameter in module.parameters()} == {"meta"}
    assert painter.null_state.device.type == "meta"
    given: list[torch.Tensor] = []
    model.text_encoder.register_forward_pre_hook(lambda _, ids: given.extend(ids))
    painter._texts(CAPTION, EDITED)
    assert [ids.device.type for ids in given] == ["meta", "meta"]


def test_a_prompts_bytes_do_not_depend_on_its_neighbours_or_on_the_order(painted_row: dict, painter) -> None:
    out = painter(batch(*rows("z", "a")))
    assert out["pairs"][1] == painted_row["pairs"]
    assert out["candidates"][1] == painted_row["candidates"]
    assert out["pairs"][0] != painted_row["pairs"]


def test_rows_with_a_status_pass_through_unpainted_with_all_their_columns(painter: PaintPairs) -> None:
    refused = {**rows("b", status="refused")[0], "reason": "unchanged", "error": "no answer"}
    out = painter({**batch(refused), "url": np.array(["http://x"])})
    assert {name: column[0] for name, column in out.items()} == {
        **refused, "url": "http://x", "candidates": [], "pairs": [], "row_evals": 0,
    }  # fmt: skip
    assert out["row_evals"].dtype == np.int64
    assert out["error"].dtype == object  # a fixed width would cut what another batch says


def test_prompt_without_a_kept_pair_is_exhausted_and_keeps_its_scores(painter: PaintPairs) -> None:
    row = with_recipe(painter, filter={"min_image": 2.0}).paint_row(rows("a")[0])
    assert (row["status"], row["pairs"]) == ("exhausted", [])
    assert {c["reason"] for c in row["candidates"]} == {"below_image"}
    assert all(-1 <= score <= 1 for score in sims(row))


def test_only_pictures_that_can_still_be_kept_stay_in_memory(painter, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    add = PaintPairs._add

    def watched(self, painted, *call) -> None:
        add(self, painted, *call)
        held.append(len(painted.pictures))

    monkeypatch.setattr(PaintPairs, "_add", watched)
    painter.paint_row(rows("a")[0])
    assert held == [2, 2, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_call_and_loses_or_repeats_no_candidate(painter, recipe, monkeypatch, error) -> None:
    painter = with_recipe(painter, pairs={"candidates_per_call": 4})
    sizes = limit_memory(monkeypatch, 2, error)
    row = painter.paint_row(rows("a")[0])
    assert sizes == [4, 2, 2, 1]
    assert [c["seed"] for c in row["candidates"]] == [c.seed for c in draw_candidates(recipe, "a")]
    assert row["status"] == "accepted"
    assert row["row_evals"] == 4 * 5 * 3
    sizes.clear()
    painter.paint_row(rows("b")[0])
    assert sizes == [4, 2, 2, 1]  # a prompt never depends on what an earlier one ran into


def test_call_that_is_shorter_than_asked_for_is_halved_from_its_own_size(painter, monkeypatch) -> None:
    sizes = limit_memory(monkeypatch, 4, MemoryError())
    with_recipe(painter, pairs={"candidates_per_call": 8}).paint_row(rows("a")[0])
    assert sizes == [5, 2, 2, 1]


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    """Calls with more than ``most`` candidates fail; returns the list that the sizes of all calls go to."""
    sizes: list[int] = []
    sample = module.sample_pairs

    def limited(unet, texts, seeds, *rest, **named):
        sizes.append(len(seeds))
        if len(seeds) > most:
            raise error
        return sample(unet, texts, seeds, *rest, **named)

    monkeypatch.setattr(module, "sample_pairs", limited)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),  # the device itself is sound
        RuntimeError("Out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
    ],
)
def test_prompt_that_does_not_fit_alone_is_an_error_row_and_the_next_goes_on(painter, monkeypatch, error) -> None:
    sizes = limit_memory(monkeypatch, 0, error)
    out = painter(batch(*rows("a", "b")))
    assert sizes == [2, 1, 2, 1]
    assert out["status"].tolist() == ["error", "error"]
    assert out["error"][0] == f"{type(error).__name__}: {error}"
    assert out["pairs"][0] == out["candidates"][0] == []


def test_failure_of_one_prompt_is_said_in_its_row_and_the_next_goes_on(painter, monkeypatch) -> None:
    draw = module.draw_candidates

    def fails_for_a(recipe: Recipe, prompt_id: str) -> list[Candidate]:
        if prompt_id == "a":
            raise ValueError("bad prompt")
        return draw(recipe, prompt_id)

    monkeypatch.setattr(module, "draw_candidates", fails_for_a)
    out = painter(batch(*rows("a", "b")))
    assert out["status"].tolist() == ["error", "accepted"]
    assert out["error"].tolist() == ["ValueError: bad prompt", ""]
    assert out["row_evals"].tolist() == [0, 60]


def test_failure_that_is_not_of_memory_is_not_tried_with_fewer_candidates(painter, monkeypatch) -> None:
    sizes = limit_memory(monkeypatch, 0, RuntimeError("shapes do not match"))
    assert painter.paint_row(rows("a")[0])["error"] == "RuntimeError: shapes do not match"
    assert sizes == [2]


def test_interrupts_are_not_a_prompts_failure(painter, monkeypatch) -> None:
    limit_memory(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        painter(batch(*rows("a")))


@pytest.mark.parametrize("error", [torch.AcceleratorError("misaligned"), RuntimeError("CUDA error: illegal access")])
def test_a_broken_device_is_no_prompts_failure_but_the_devices(painter, monkeypatch, error: Exception) -> None:
    limit_memory(monkeypatch, 0, error)
    with pytest.raises(DeviceError, match=f"^cpu failed while painting a: {error}$"):
        painter(batch(*rows("a")))


@pytest.mark.filterwarnings("error")  # NaN is not cast to pixels either
def test_candidate_that_is_not_finite_is_refused_and_the_others_are_kept(painter, monkeypatch) -> None:
    sample = module.sample_pairs

    def spoiled(*given, **named):
        latents, row_evals = sample(*given, **named)
        if len(latents) == 2:
            latents[1, 1] = float("nan")  # the edited picture alone
        return latents, row_evals

    monkeypatch.setattr(module, "sample_pairs", spoiled)
    row = painter.paint_row(rows("a")[0])
    assert [c["reason"] == "not_finite" for c in row["candidates"]] == [False, True, False, True, False]
    assert (row["status"], len(row["pairs"])) == ("accepted", 2)


def test_pair_id_names_the_pictures_and_changes_with_whatever_changes_them(painter, recipe: Recipe) -> None:
    candidate = draw_candidates(recipe, "a")[0]
    texts = ("a", CAPTION, EDITED)
    plain = painter._pair_id(texts, candidate)
    ids = {plain, *(painter._pair_id((*texts[:k], "b", *texts[k + 1 :]), candidate) for k in range(3))}
    for name in ("seed", "p2p_threshold", "guidance_scale"):
        ids.add(painter._pair_id(texts, dataclasses.replace(candidate, **{name: 3})))
    for sections in ({"pairs": {"resolution": 24}}, {"models": {"dtype": "float16"}}):
        ids.add(with_recipe(painter, **sections)._pair_id(texts, candidate))
    changed = copy.copy(painter)
    for field, value in (("steps", 9), ("sampler", "dpmpp_2m"), ("p2p_mode", "self")):
        changed.settings = dataclasses.replace(painter.settings, **{field: value})
        ids.add(changed._pair_id(texts, candidate))
    changed.settings = painter.settings
    for name in ("unet", "vae", "text_encoder"):
        changed.model = dataclasses.replace(painter.model, sha256={**painter.model.sha256, name: "other"})
        ids.add(changed._pair_id(texts, candidate))
    assert len(ids) == 15
    scored = dataclasses.replace(candidate, sim_direction=0.5, reason="kept")
    assert painter._pair_id(texts, scored) == plain


def test_equal_captions_paint_equal_pictures_which_the_filter_then_refuses(painter: PaintPairs) -> None:
    row = with_recipe(painter, filter={"min_direction": 0.2}).paint_row({**rows("a")[0], "edited_caption": CAPTION})
    assert row["status"] == "exhausted"
    assert sims(row, "sim_image") == pytest.approx([1.0] * 5, abs=1e-6)


def test_one_caption_with_two_edits_gives_pairs_of_different_ids(painted_row: dict, painter: PaintPairs) -> None:
    other = painter.paint_row({**rows("a")[0], "edited_caption": "a red boat on water at sunset"})
    assert not {pair["pair_id"] for pair in other["pairs"]} & {pair["pair_id"] for pair in painted_row["pairs"]}


def test_jpeg_recipe_stores_jpeg(painter: PaintPairs) -> None:
    row = with_recipe(painter, output={"image_format": "jpeg"}).paint_row(rows("a")[0])
    assert row["pairs"][0]["edited_image"][:3] == b"\xff\xd8\xff"


def test_half_precision_unet_paints_finite_pictures(recipe: Recipe) -> None:
    models = dataclasses.replace(recipe.models, dtype="bfloat16")
    row = PaintPairs(dataclasses.replace(recipe, models=models), "cpu").paint_row(rows("a")[0])
    assert (row["status"], len(row["pairs"])) == ("accepted", 2)


def test_resolution_that_the_vae_cannot_make_is_a_recipe_error(recipe: Recipe) -> None:
    odd = dataclasses.replace(recipe, pairs=dataclasses.replace(recipe.pairs, resolution=17))
    with pytest.raises(RecipeError, match=r"pairs\.resolution 17 is not a multiple of 2"):
        PaintPairs(odd, "cpu")


def test_threads_are_set_only_when_asked_for(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    PaintPairs(recipe, "cpu")
    assert asked == []
    PaintPairs(recipe, "cpu", threads=3)
    assert asked == [3]
