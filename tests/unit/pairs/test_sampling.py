"""The batched sampler against the released code's loop, restated one pair at a time with explicit logits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_family import TEXT_WIDTH, tiny_unet

from ip2p.pairs.alignment import Alignment, align_tokens
from ip2p.pairs.prompt_to_prompt import PromptToPrompt
from ip2p.pairs.sampling import (
    PairDenoiser,
    PairNoise,
    PairTexts,
    SamplerSettings,
    dpmpp_2m,
    euler_ancestral,
    sample_pairs,
    sharing_steps,
    to_denoised,
)
from ip2p.pairs.sigmas import sigma_table

WINDOW, STEPS, SHAPE = 12, 6, (4, 8, 8)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
SETTINGS = SamplerSettings(SD, STEPS, latent_shape=SHAPE)
SEEDS, THRESHOLDS, GUIDANCE = [11, 12, 2**32 - 1], [0.2, 0.55, 0.9], [3.0, 4.5, 6.0]
UNET = tiny_unet()
# Rounding grows from step to step, so whole trajectories are compared in float64, where only real differences are left.
UNET64 = tiny_unet().double()


def texts(count: int = 3, same: bool = False) -> PairTexts:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(count, 2, WINDOW, TEXT_WIDTH, generator=generator)
    if same:
        states[:, 1] = states[:, 0]
    aligned = [align_tokens([50, 1, 2, *[51] * 9], [50, 1, 3, 4, *[51] * 8], 51)] * count
    identity = [Alignment(np.eye(WINDOW, dtype=np.float32), np.zeros(WINDOW, np.float32))] * count
    return PairTexts(states, torch.randn(WINDOW, TEXT_WIDTH, generator=generator), identity if same else aligned)


def one(all_texts: PairTexts, place: int) -> PairTexts:
    assert all_texts.alignments is not None
    return PairTexts(all_texts.states[place : place + 1], all_texts.null_state, all_texts.alignments[place : place + 1])


class CopiedLogits:
    """The released rule: four rows, logits of self-attention replaced by (s0, s0, s2, s2) while ``share`` holds."""

    share = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows, heads = len(hidden_states), attn.heads
        assert rows == 4
        query, key, value = (
            states.reshape(rows, -1, heads, states.shape[-1] // heads).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        sim = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self.share and encoder_hidden_states is None:
            sim = torch.stack([sim[0], sim[0], sim[2], sim[2]])
        mixed = (sim.softmax(dim=-1) @ value).transpose(1, 2).reshape(rows, -1, heads * value.shape[-1])
        return attn.to_out[0](mixed)


def released_pair(pair: PairTexts, seed: int, p: float, guidance: float) -> torch.Tensor:
    """One pair, as the released code paints it, with the noise of one CPU generator; ``(2, 4, 8, 8)``."""
    unet, rule = tiny_unet().double(), CopiedLogits()
    unet.set_attn_processor(rule)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    log_sigmas = np.log(np.sqrt((1 - signal) / signal))
    timesteps = np.linspace(999, 0, STEPS)
    sigmas = np.append(np.exp(np.interp(timesteps, np.arange(1000), log_sigmas)), 0)
    states = torch.cat([pair.null_state[None], pair.null_state[None], pair.states[0]]).double()
    generator = torch.Generator("cpu").manual_seed(seed)
    x = (torch.randn(SHAPE, generator=generator).double() * sigmas[0]).expand(2, -1, -1, -1)
    for i in range(len(sigmas) - 1):
        rule.share = p > i / (len(sigmas) - 2)
        x_in, sigma = torch.cat([x, x]), sigmas[i]
        v = unet(x_in / (sigma**2 + 1) ** 0.5, torch.tensor(timesteps[i]).float(), encoder_hidden_states=states).sample
        uncond, cond = (x_in / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5).chunk(2)
        denoised = uncond + (cond - uncond) * guidance
        up = min(sigmas[i + 1], (sigmas[i + 1] ** 2 * (sigma**2 - sigmas[i + 1] ** 2) / sigma**2) ** 0.5)
        down = (sigmas[i + 1] ** 2 - up**2) ** 0.5
        x = x + (x - denoised) / sigma * (down - sigma)
        if sigmas[i + 1] > 0:
            x = x + torch.randn(SHAPE, generator=generator).double() * up
    return x


@pytest.fixture(scope="module")
def painted() -> dict[str, torch.Tensor]:
    """Three candidates with different p in one batch, by mode."""
    modes = ("self", "cross", "off")
    settings = {mode: replace(SETTINGS, p2p_mode=mode) for mode in modes}
    return {mode: sample_pairs(UNET, texts(), SEEDS, THRESHOLDS, GUIDANCE, settings[mode])[0] for mode in modes}


def test_self_mode_is_the_released_rule_for_every_p_of_the_batch(painted) -> None:
    found, _ = sample_pairs(UNET64, texts(), SEEDS, THRESHOLDS, GUIDANCE, SETTINGS)
    for place in range(3):
        expected = released_pair(one(texts(), place), SEEDS[place], THRESHOLDS[place], GUIDANCE[place])
        assert (found[place] - expected).abs().max() < 1e-9
        assert (painted["self"][place] - expected).abs().max() < 1e-3  # float32


def test_sharing_changes_the_edited_picture_and_never_the_original(painted) -> None:
    for mode in ("self", "cross"):
        moved = (painted[mode] - painted["off"]).abs().amax(dim=(2, 3, 4))
        assert moved[:, 0].max() < 1e-5
        assert moved[:, 1].min() > 1e-2


@pytest.mark.parametrize("mode", ["self", "cross"])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_a_batch_of_candidates_equals_each_alone(mode: str, sampler: str) -> None:
    settings = replace(SETTINGS, p2p_mode=mode, sampler=sampler)
    together, _ = sample_pairs(UNET64, texts(), SEEDS, THRESHOLDS, GUIDANCE, settings)
    for k in range(3):
        alone, _ = sample_pairs(
            UNET64, one(texts(), k), SEEDS[k : k + 1], THRESHOLDS[k : k + 1], GUIDANCE[k : k + 1], settings
        )
        assert (together[k] - alone[0]).abs().max() < 1e-9


@pytest.mark.parametrize("mode", ["self", "cross", "off"])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_equal_captions_give_equal_pictures_at_any_p(mode: str, sampler: str) -> None:
    settings = replace(SETTINGS, p2p_mode=mode, sampler=sampler)
    latents, _ = sample_pairs(UNET, texts(same=True), SEEDS, [0.0, 0.5, 1.0], GUIDANCE, settings)
    assert (latents[:, 0] - latents[:, 1]).abs().max() < 1e-6 * max(1.0, float(latents.abs().max()))
    assert (latents[0, 0] - latents[1, 0]).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["self", "cross"])
@pytest.mark.parametrize("p", [0.0, -1.0])
def test_p_of_zero_or_less_is_a_plain_pair_with_shared_noise(painted, mode: str, p: float) -> None:
    latents, _ = sample_pairs(UNET, texts(), SEEDS, [p] * 3, GUIDANCE, replace(SETTINGS, p2p_mode=mode))
    assert torch.equal(latents, painted["off"])


def test_at_p_of_one_the_last_step_is_still_unshared() -> None:
    tens = torch.tensor([0.0, 0.5, 1.0])
    assert [sharing_steps(tens, step, 5).tolist() for step in (0, 2, 4)] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]


@pytest.mark.parametrize(("steps", "counts"), [(100, [10, 50, 90]), (20, [2, 10, 18])])
def test_sharing_steps_are_counted_as_in_the_released_code(steps: int, counts: list[int]) -> None:
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert sum(sharing_steps(p, step, steps).long() for step in range(steps)).tolist() == counts


@pytest.mark.parametrize("mode", ["self", "cross"])
def test_both_guidance_halves_are_tied_and_only_edited_rows(mode: str, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(PromptToPrompt, "set_rows", lambda self, *rows: seen.append(rows))
    settings = replace(SETTINGS, p2p_mode=mode)
    denoise = PairDenoiser(UNET, PromptToPrompt(UNET, mode), texts(2), [0.3, 0.7], [1.0, 2.0], settings)
    for step in (0, 3, 5):
        denoise(torch.zeros(2, 2, *SHAPE), step)
    sharing = [rows[0].tolist() for rows in seen]
    assert sharing[0] == [False, False, True, True] * 2
    assert sharing[1] == [False, False, False, True] * 2
    assert sharing[2] == [False] * 8
    assert seen[0][1].tolist() == [0, 1, 0, 1, 4, 5, 4, 5]


def test_null_rows_align_with_themselves_and_caption_rows_by_their_captions() -> None:
    given = texts(2)
    settings = replace(SETTINGS, p2p_mode="cross")
    denoise = PairDenoiser(UNET, PromptToPrompt(UNET, "cross"), given, [0.5] * 2, [2.0] * 2, settings)
    assert given.alignments is not None
    assert denoise.share is not None
    assert denoise.own is not None
    assert torch.equal(denoise.share[2], torch.eye(WINDOW))
    assert denoise.own[:4].sum() == 0
    assert torch.equal(denoise.share[6], torch.from_numpy(given.alignments[0].share))
    assert not torch.equal(denoise.share[6], torch.eye(WINDOW))


@pytest.mark.parametrize("mode", ["self", "cross", "off"])
def test_scales_of_one_need_half_the_rows_and_paint_what_all_rows_would(mode: str) -> None:
    settings = replace(SETTINGS, p2p_mode=mode)
    beside_another, all_rows = sample_pairs(UNET64, texts(3), SEEDS, [0.2, 0.6, 1.0], [1.0, 1.0, 4.0], settings)
    alone, rows = sample_pairs(UNET64, texts(2), SEEDS[:2], [0.2, 0.6], [1.0, 1.0], settings)
    assert (alone - beside_another[:2]).abs().max() < 1e-9
    assert (rows, all_rows) == (2 * 2 * SETTINGS.steps, 4 * 3 * SETTINGS.steps)


def test_noise_is_shared_within_a_pair_and_never_across_candidates() -> None:
    shape = (1, 2, 2)
    noise = PairNoise([5, 6, 5], shape)
    first, second = noise(), noise()
    generator = torch.Generator("cpu").manual_seed(6)
    assert torch.equal(first[1, 0], torch.randn(shape, generator=generator))
    assert torch.equal(second[1, 0], torch.randn(shape, generator=generator))
    assert first.shape == (3, 1, *shape)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_euler_ancestral_draws_start_and_one_noise_for_each_step_but_the_last() -> None:
    drawn = []

    def noise() -> torch.Tensor:
        drawn.append(1)
        return torch.zeros(1)

    euler_ancestral(lambda x, step: x, torch.zeros(1), [3.0, 2.0, 1.0, 0.0], noise)
    assert len(drawn) == 2
    dpmpp_2m(lambda x, step: x, torch.zeros(1), [3.0, 2.0, 1.0, 0.0], noise)
    assert len(drawn) == 2


def test_row_evals_count_every_row_of_every_call() -> None:
    for steps, count in ((6, 3), (4, 1)):
        settings = replace(SETTINGS, steps=steps)
        found = sample_pairs(UNET, texts(count), SEEDS[:count], THRESHOLDS[:count], GUIDANCE[:count], settings)
        assert found[1] == 4 * count * steps
        assert found[0].shape == (count, 2, *SHAPE)
        assert found[0].dtype == torch.float32


def test_epsilon_and_v_models_agree_when_they_say_the_same() -> None:
    class AsEpsilon(torch.nn.Module):
        """The tiny v model, answering with the noise that its v stands for."""

        device, dtype = torch.device("cpu"), torch.float64

        def forward(self, scaled, timestep, encoder_hidden_states):
            v = UNET64(scaled, timestep, encoder_hidden_states=encoder_hidden_states).sample
            sigma = float(np.interp(float(timestep), times[::-1], sigmas[::-1]))
            signal = 1 / math.sqrt(sigma**2 + 1)
            return SimpleNamespace(sample=signal * v + sigma * signal * scaled)

    times = np.linspace(999, 0, STEPS)
    sigmas = sigma_table(SD, STEPS)[:-1].numpy()
    settings = replace(SETTINGS, p2p_mode="off", scheduler_config={**SD, "prediction_type": "epsilon"})
    latents, _ = sample_pairs(AsEpsilon(), texts(), SEEDS, THRESHOLDS, GUIDANCE, settings)
    expected, _ = sample_pairs(UNET64, texts(), SEEDS, THRESHOLDS, GUIDANCE, replace(SETTINGS, p2p_mode="off"))
    assert (latents - expected).abs().max() < 1e-4


def test_predictions_are_turned_back_into_what_was_noised() -> None:
    clean, noise, sigma = torch.tensor([0.5]), torch.tensor([-2.0]), 3.0
    noisy, length = clean + sigma * noise, math.sqrt(sigma**2 + 1)
    assert to_denoised(noise, noisy, sigma, "epsilon").item() == pytest.approx(0.5)
    assert to_denoised((noise - sigma * clean) / length, noisy, sigma, "v_prediction").item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="known: epsilon, v_prediction"):
        to_denoised(noise, noisy, sigma, "sample")


def test_guidance_is_applied_per_candidate_on_denoised_predictions() -> None:
    settings = replace(SETTINGS, p2p_mode="off")

    def denoised(guidance: list[float]) -> torch.Tensor:
        denoiser = PairDenoiser(UNET, PromptToPrompt(UNET, "off"), texts(2), [0.5, 0.5], guidance, settings)
        return denoiser(torch.ones(2, 2, *SHAPE), 2)

    null, caption, mixed = denoised([0.0, 0.0]), denoised([1.0, 1.0]), denoised([3.0, 7.0])
    assert (mixed[0] - (null[0] + 3 * (caption[0] - null[0]))).abs().max() < 1e-4
    assert (mixed[1] - (null[1] + 7 * (caption[1] - null[1]))).abs().max() < 1e-4
    assert (null[:, 0] - null[:, 1]).abs().max() < 1e-5
    assert (caption[:, 0] - caption[:, 1]).abs().max() > 1e-3


def gaussian(mean: float, deviation: float, sigmas: list[float]):
    """The exact denoiser of N(mean, deviation^2)."""

    def denoise(latents: torch.Tensor, step: int) -> torch.Tensor:
        noise_variance = sigmas[step] ** 2
        return (deviation**2 * latents + noise_variance * mean) / (deviation**2 + noise_variance)

    return denoise


@pytest.mark.parametrize("mode", ["self", "cross"])
def test_one_float32_step_of_a_batch_equals_that_step_alone(mode: str) -> None:
    settings = replace(SETTINGS, p2p_mode=mode)
    latents = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(9))

    def step(pair: PairTexts, latents: torch.Tensor, places: slice) -> torch.Tensor:
        sharing = PromptToPrompt(UNET, mode)
        denoise = PairDenoiser(UNET, sharing, pair, THRESHOLDS[places], GUIDANCE[places], settings)
        with sharing.installed():
            return denoise(latents, 2)

    together = step(texts(), latents, slice(0, 3))
    for k in range(3):
        assert (together[k] - step(one(texts(), k), latents[k : k + 1], slice(k, k + 1))[0]).abs().max() < 1e-5


def never() -> torch.Tensor:
    raise AssertionError("dpmpp_2m draws no noise")


def test_dpmpp_2m_converges_to_the_exact_solution_at_second_order() -> None:
    def error(steps: int) -> float:
        # Even in log sigma and without the last jump to 0, the order shows cleanly.
        sigmas = torch.logspace(math.log10(14.6), -1, steps + 1, dtype=torch.float64).tolist()
        start = torch.tensor([10.0], dtype=torch.float64)
        end = dpmpp_2m(gaussian(2.0, 0.5, sigmas), start, sigmas, never).item()
        exact = 2.0 + (10.0 - 2.0) * math.sqrt((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2))
        return abs(end - exact)

    assert error(40) < 3e-3
    assert 3.0 < error(40) / error(80) < 5.0


def test_dpmpp_2m_follows_the_reference_formula_step_by_step() -> None:
    sigmas = sigma_table(SD, 5).tolist()
    denoise = gaussian(1.0, 0.7, sigmas)
    x = torch.tensor([9.0, -4.0], dtype=torch.float64)
    found = dpmpp_2m(denoise, x, sigmas, never)
    old = None
    for i in range(5):
        denoised = denoise(x, i)
        t, t_next = -math.log(sigmas[i]), (-math.log(sigmas[i + 1]) if sigmas[i + 1] > 0 else math.inf)
        h = t_next - t
        if old is None or sigmas[i + 1] == 0:
            x = (math.exp(-t_next) / math.exp(-t)) * x - math.expm1(-h) * denoised
        else:
            r = (t - -math.log(sigmas[i - 1])) / h
            d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
            x = (math.exp(-t_next) / math.exp(-t)) * x - math.expm1(-h) * d
        old = denoised
    assert found.tolist() == pytest.approx(x.tolist(), rel=1e-12)


def test_euler_ancestral_samples_the_distribution_of_an_exact_denoiser() -> None:
    sigmas = sigma_table(SD, 200).tolist()
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(20000, generator=generator)

    samples = euler_ancestral(gaussian(2.0, 0.5, sigmas), noise() * sigmas[0], sigmas, noise)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.03)
    assert samples.std().item() == pytest.approx(0.5, abs=0.03)
