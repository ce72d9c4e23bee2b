"""How the family is trained: repeatable, resumable, and in formats that other libraries load."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ip2p.postcards.family import autoencoder, clip, text_to_image, tokenizer, triplet_lm
from ip2p.postcards.family.drawings import cached_drawings
from ip2p.postcards.family.fitting import Schedule, fit


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder)
    return folder


def line_problem(seed: int = 0) -> tuple[torch.nn.Linear, object]:
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 1)

    def loss_of(step: int) -> torch.Tensor:
        x = torch.from_numpy(np.random.default_rng((9, step)).standard_normal((8, 3), dtype=np.float32))
        return (module(x) - x.sum(1, keepdim=True) - 2).square().mean()

    return module, loss_of


def quiet(line: str) -> None:
    pass


def test_fitting_finds_the_line_and_returns_the_moving_average(tmp_path):
    module, loss_of = line_problem()
    average = fit("line", tmp_path, module, loss_of, Schedule(400, 8, 0.05, warmup=10, ema_decay=0.9), quiet)
    assert torch.allclose(average.weight, torch.ones(1, 3), atol=0.05)
    assert average.bias.item() == pytest.approx(2, abs=0.05)
    assert not torch.equal(average.weight, module.weight)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    schedule = Schedule(30, 8, 0.05, warmup=5, ema_decay=0.9, checkpoint_every_s=0.0)
    module, loss_of = line_problem()
    whole = fit("whole", tmp_path, module, loss_of, schedule, quiet)

    module, loss_of = line_problem()

    def stops(step: int) -> torch.Tensor:
        if step == 17:
            raise KeyboardInterrupt
        return loss_of(step)

    with pytest.raises(KeyboardInterrupt):
        fit("cut", tmp_path, module, stops, schedule, quiet)
    module, loss_of = line_problem(seed=5)  # another start: all must come from the checkpoint
    first_steps = []

    def counted(step: int) -> torch.Tensor:
        first_steps.append(step)
        return loss_of(step)

    again = fit("cut", tmp_path, module, counted, schedule, quiet)
    assert first_steps[0] == 17
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)


def test_frozen_parameters_stay(tmp_path):
    module, loss_of = line_problem()
    module.bias.requires_grad_(False)
    before = module.bias.clone()
    fit("frozen", tmp_path, module, loss_of, Schedule(5, 8, 0.05), quiet)
    assert torch.equal(module.bias, before)


def test_learning_rate_rises_then_falls_to_nothing():
    schedule = Schedule(100, 1, 1.0, warmup=10)
    rates = [schedule.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5, abs=0.01)
    assert rates[100] == pytest.approx(0.0, abs=1e-9)


def test_every_word_of_the_grammar_is_one_token_and_others_still_tokenise(tokenizer_folder):
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(tokenizer_folder)
    for word in list(tokenizer.grammar_words(200)):
        if word.isalpha():
            assert len(loaded(word)["input_ids"]) == 3, word
    ids = loaded("Zebra €")["input_ids"]
    assert len(ids) > 4
    assert loaded.decode(ids[1:-1]).replace(" ", "") == "zebra€"
    assert loaded.model_max_length == 77


def test_byte_symbols_are_all_256_and_different():
    assert len(set(tokenizer.byte_symbols())) == 256


def test_the_unets_text_encoder_is_the_clip_text_tower(tokenizer_folder):
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(tokenizer_folder)
    model = clip.new_clip(len(loaded)).eval()
    encoder = clip.text_encoder_of(model)
    texts = ["a red boat on sand", "", "a comic panel of a blue house at night with birds"]
    ids = loaded(texts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pooled = encoder(ids).pooler_output @ model.text_projection
        assert torch.allclose(pooled, model.encode_text(ids), atol=1e-5)


def test_saved_clip_loads_with_the_same_features(tokenizer_folder, tmp_path):
    from ip2p.config import Models
    from ip2p.models.components import load_clip

    model = clip.new_clip(len(json.loads((tokenizer_folder / "vocab.json").read_text()))).eval()
    clip.save_clip(model, tokenizer_folder, tmp_path / "clip")
    loaded = load_clip(Models(clip=str(tmp_path / "clip")), "cpu")
    assert loaded.image_size == 64
    assert loaded.mean == (0.5, 0.5, 0.5)
    ids = loaded.tokenizer(["a red boat"])
    assert ids.shape == (1, 77)
    pictures = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(loaded.model.encode_image(pictures), model.encode_image(pictures), atol=0.02)
        assert torch.allclose(loaded.model.encode_text(ids), model.encode_text(ids), atol=0.02)


def test_clip_trained_on_may_hold_its_text_tower(tmp_path):
    drawings = cached_drawings(tmp_path, 8)
    schedule = Schedule(2, 4, 1e-3, warmup=1, ema_decay=0.0)
    made = clip.train_clip(tmp_path / "held", drawings, schedule, hold_text=True).state_dict()
    start = clip.new_clip(len(json.loads((tmp_path / "held" / "tokenizer" / "vocab.json").read_text()))).state_dict()
    moved = {name for name, value in made.items() if not torch.equal(value, start[name])}
    assert "visual.conv1.weight" in moved
    assert all(name.startswith("visual.") for name in moved)


def test_clip_batches_hold_each_drawing_beside_its_edit(tmp_path):
    drawings = cached_drawings(tmp_path, 40)
    pixels, captions = clip.clip_batch(drawings, 3, 8)
    assert pixels.shape == (8, 64, 64, 3)
    assert len(captions) == 8
    related = [(before == after).mean() for before, after in zip(pixels[:4], pixels[4:], strict=True)]
    strangers = [(before == after).mean() for before, after in zip(pixels[:4], np.roll(pixels[4:], 1, 0), strict=True)]
    assert max(related) < 1
    assert np.mean(related) > 2 * np.mean(strangers)
    again = clip.clip_batch(drawings, 3, 8)
    np.testing.assert_array_equal(pixels, again[0])
    assert captions == again[1]


def test_autoencoder_makes_8x8x4_latents(tmp_path):
    drawings = cached_drawings(tmp_path, 8)
    vae = autoencoder.train_autoencoder(tmp_path / "a", drawings, Schedule(2, 4, 1e-3, warmup=1, ema_decay=0.0))
    means, stds = autoencoder.encode_all(vae, drawings, batch=3)
    assert means.shape == stds.shape == (8, 4, 8, 8)


def test_an_autoencoder_trained_on_stays_near_the_latents_it_is_held_to(tmp_path):
    drawings = cached_drawings(tmp_path, 8)
    torch.manual_seed(5)
    held = autoencoder.new_autoencoder().requires_grad_(False).eval()
    wanted = autoencoder.encode_all(held, drawings)[0]
    schedule = Schedule(15, 4, 2e-3, warmup=1, ema_decay=0.0)

    def distance(folder, hold):
        made = autoencoder.train_autoencoder(tmp_path / folder, drawings, schedule, hold=hold)
        return (autoencoder.encode_all(made, drawings)[0] - wanted).pow(2).mean().item()

    assert distance("held", held) < 0.5 * distance("free", None)


def test_reconstruction_loss_is_zero_for_the_same_and_grows_with_error():
    picture = torch.rand(1, 3, 16, 16)
    assert autoencoder.reconstruction_loss(picture, picture).item() == 0
    near, far = (autoencoder.reconstruction_loss(picture + e, picture).item() for e in (0.01, 0.1))
    assert 0 < near < far


class KnowsAllLatents(torch.nn.Module):
    """The best possible model of a world in which every clean latent is one half."""

    def forward(self, noisy, timesteps, text):
        a = text_to_image.alphas_cumprod()[timesteps][:, None, None, None]
        noise = (noisy - a.sqrt() * 0.5) / (1 - a).sqrt()
        return SimpleNamespace(sample=a.sqrt() * noise - (1 - a).sqrt() * 0.5)


def test_the_target_is_v():
    clean, noise = torch.full((3, 4, 8, 8), 0.5), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([40, 500, 999])
    assert text_to_image.v_loss(KnowsAllLatents(), clean, noise, timesteps, None).item() < 1e-9
    assert text_to_image.v_loss(KnowsAllLatents(), -clean, noise, timesteps, None).item() > 0.1


def test_text_to_image_trains_on_scaled_latents_and_resumes(tmp_path, tokenizer_folder):
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(tokenizer_folder)
    encoder = clip.text_encoder_of(clip.new_clip(len(loaded))).requires_grad_(False)
    drawings = cached_drawings(tmp_path, 4)
    latents = (torch.randn(4, 4, 8, 8), torch.full((4, 4, 8, 8), 0.1))

    def trained(name: str, scaling: float, steps: int):
        schedule = Schedule(steps, 2, 1e-3, warmup=1, ema_decay=0.0)
        return text_to_image.train_text_to_image(
            tmp_path, drawings, latents, scaling, loaded, encoder, schedule, name=name
        ).conv_out.weight

    assert torch.equal(trained("a", 0.5, 1), trained("b", 0.5, 1))
    assert not torch.equal(trained("a", 0.5, 1), trained("c", 0.9, 1))


def test_signal_power_is_stable_diffusions():
    signal = text_to_image.alphas_cumprod()
    sigma = ((1 - signal) / signal).sqrt()
    assert sigma[-1].item() == pytest.approx(14.6146, abs=1e-3)
    assert sigma[0].item() == pytest.approx(0.029168, abs=1e-5)


def test_scaling_factor_brings_latents_to_unit_deviation():
    latents = torch.randn(50, 4, 8, 8) * 3
    assert (latents * text_to_image.scaling_factor_of(latents)).std().item() == pytest.approx(1, abs=1e-4)


def test_lm_examples_come_in_equal_shares_and_train_on_the_completion_only(tmp_path):
    tasks = [triplet_lm.example_of(i).task for i in range(90)]
    assert {task: tasks.count(task) for task in set(tasks)} == dict.fromkeys(triplet_lm.TASKS, 10)
    loaded = triplet_lm.write_lm_tokenizer(tmp_path, examples=200)
    texts = [triplet_lm.text_of(triplet_lm.example_of(i)) for i in range(3)]
    tokens, wanted = triplet_lm.completion_batch(texts, loaded)
    for row, (prompt, completion) in enumerate(texts):
        learned = tokens[row][wanted[row] != -100]
        assert loaded.decode(learned.tolist()) == completion
        assert loaded.decode(tokens[row].tolist(), skip_special_tokens=True) == prompt + completion
