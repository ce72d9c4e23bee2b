"""Edit models as folders: loaded back by us and, as they are, by diffusers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_family import tiny_unet

from ip2p.config import Models
from ip2p.editing.editor import Editor
from ip2p.errors import CheckpointError, InputError, StorageError
from ip2p.models import export
from ip2p.models.checkpoint import verify_manifest
from ip2p.models.components import EditModel, load_edit_model, load_text_to_image, own_scales
from ip2p.models.export import euler_ancestral_config, save_edit_model


@pytest.fixture(scope="module")
def model(tiny_family: Path) -> EditModel:
    base = load_text_to_image(Models(text_to_image=str(tiny_family / "text_to_image")), "cpu")
    return EditModel(**{**vars(base), "unet": tiny_unet(in_channels=8)})


@pytest.fixture(scope="module")
def saved(model: EditModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_edit_model(model, folder, about={"made_by": "a test"})
    return folder


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_folder_does_not_tell_where_its_parts_were_read(saved: Path, tmp_path: Path) -> None:
    save_edit_model(load_edit_model(saved, device="cpu"), tmp_path / "again")
    told = [path for path in (tmp_path / "again").rglob("*.json") if str(saved) in path.read_text()]
    assert told == []
    for name in ("unet/config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def picture() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_saved_folder_loads_back_with_the_same_tensors(model: EditModel, saved: Path) -> None:
    loaded = load_edit_model(saved, device="cpu")
    assert all(same_tensors(getattr(loaded, part), getattr(model, part)) for part in ("unet", "vae", "text_encoder"))
    assert loaded.tokenizer("a red boat")["input_ids"] == model.tokenizer("a red boat")["input_ids"]
    assert loaded.scheduler_config["prediction_type"] == "v_prediction"
    assert loaded.image_latent_scaled is False
    assert set(loaded.sha256) == {"unet", "vae", "text_encoder"}


def test_manifest_names_every_file_and_how_they_were_made(saved: Path) -> None:
    verify_manifest(saved)
    manifest = json.loads((saved / "manifest.json").read_text())
    written = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == written - {"manifest.json"}
    assert {"model_index.json", "edit_model.json", "unet/diffusion_pytorch_model.safetensors"} <= written
    assert manifest["about"] == {"made_by": "a test"}


@pytest.mark.parametrize("scaled", [False, True])
def test_diffusers_loads_the_folder_as_it_is_and_edits_alike(model: EditModel, tmp_path: Path, scaled: bool) -> None:
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    model = dataclasses.replace(model, image_latent_scaled=scaled)
    save_edit_model(model, tmp_path / "model")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.config.requires_safety_checker is False  # else it warns on every load
    assert isinstance(pipeline.scheduler, EulerAncestralDiscreteScheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "make it night", Image.fromarray(picture()), num_inference_steps=3, guidance_scale=4.0, output_type="np",
        generator=[torch.Generator().manual_seed(5)],
    ).images[0]  # fmt: skip
    ours = Editor(model).edit([picture()], ["make it night"], steps=3, guidance_scale=4.0, seed=5)[0]
    assert np.abs(ours / 255 - theirs).max() <= 1 / 255


def test_weights_can_be_written_in_half_precision_without_touching_the_model(model: EditModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_edit_model(model, tmp_path / "half", dtype="float16")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert (model.unet.dtype, model.vae.dtype, model.text_encoder.dtype) == (torch.float32,) * 3
    assert load_edit_model(tmp_path / "half", device="cpu").unet.dtype == torch.float32


def test_scaling_the_weights_leaves_the_given_model_alone(model: EditModel) -> None:
    before = model.unet.conv_in.weight.clone()
    folded = export.with_unscaled_image(dataclasses.replace(model, image_latent_scaled=True))
    assert torch.equal(model.unet.conv_in.weight, before)
    assert torch.equal(folded.unet.conv_in.weight[:, :4], before[:, :4])
    assert torch.equal(folded.unet.conv_in.weight[:, 4:], before[:, 4:] * model.vae.config.scaling_factor)
    assert folded.image_latent_scaled is False


def test_scheduler_keeps_the_noise_schedule_and_takes_our_sampler() -> None:
    found = euler_ancestral_config(
        {"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear",
         "num_train_timesteps": 500, "prediction_type": "epsilon", "skip_prk_steps": True, "steps_offset": 1,
         "timestep_spacing": "leading", "clip_sample": False}
    )  # fmt: skip
    assert found == {
        "_class_name": "EulerAncestralDiscreteScheduler", "beta_start": 0.001, "beta_end": 0.02,
        "beta_schedule": "linear", "num_train_timesteps": 500, "prediction_type": "epsilon",
        "timestep_spacing": "linspace", "steps_offset": 0,
    }  # fmt: skip


def test_existing_folder_is_not_written_over(model: EditModel, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="model: already exists"):
        save_edit_model(model, tmp_path / "model")


def test_folder_appears_whole_or_not_at_all(model: EditModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(folder: Path, about: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_manifest", full_disk)
    with pytest.raises(StorageError, match=r"model: cannot be written \(No space left on device\)"):
        save_edit_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_scales_of_its_own_travel_with_the_model(model: EditModel, saved: Path, tmp_path: Path) -> None:
    assert own_scales(saved) == (7.5, 1.5)
    save_edit_model(dataclasses.replace(model, guidance_scale=3.0, image_guidance_scale=1.2), tmp_path / "model")
    loaded = load_edit_model(tmp_path / "model", device="cpu")
    assert (loaded.guidance_scale, loaded.image_guidance_scale) == (3.0, 1.2) == own_scales(tmp_path / "model")
    asked = Editor(model).edit([picture()], ["make it night"], steps=2, guidance_scale=3.0, image_guidance_scale=1.2)
    assert np.array_equal(Editor(loaded).edit([picture()], ["make it night"], steps=2)[0], asked[0])
    (tmp_path / "model" / "edit_model.json").write_text('{"guidance_scale": "high"}')
    with pytest.raises(CheckpointError, match=r"edit_model\.json: found guidance_scale 'high', expected a number"):
        own_scales(tmp_path / "model")


def test_convention_is_read_from_the_folder_and_checked(model: EditModel, tmp_path: Path) -> None:
    save_edit_model(model, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    (tmp_path / "model" / "edit_model.json").write_text('{"image_latent_scaled": true}')
    assert load_edit_model(tmp_path / "model", device="cpu").image_latent_scaled is True
    (tmp_path / "model" / "edit_model.json").write_text('{"image_latent_scaled": "no"}')
    with pytest.raises(CheckpointError, match=r"edit_model\.json: found image_latent_scaled 'no', expected true or"):
        load_edit_model(tmp_path / "model", device="cpu")
    (tmp_path / "model" / "edit_model.json").unlink()
    assert load_edit_model(tmp_path / "model", device="cpu").image_latent_scaled is False
