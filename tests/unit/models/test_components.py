from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_family import clip_tokenizer, tiny_unet

import ip2p
from ip2p.config import Models
from ip2p.errors import CheckpointError, InputError, RecipeError
from ip2p.models import components
from ip2p.models.checkpoint import file_sha256, write_manifest
from ip2p.models.components import (
    embedded_folder,
    find_clip,
    load_clip,
    load_edit_model,
    load_text_to_image,
    read_scheduler_config,
    resolve_device,
)

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def own(tiny_family: Path, tmp_path: Path) -> Path:
    """A private copy of the text-to-image folder, to be damaged."""
    return shutil.copytree(tiny_family / "text_to_image", tmp_path / "own")


@pytest.fixture
def own_clip(tiny_family: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_family / "clip", tmp_path / "own_clip")


@pytest.fixture
def embedded(tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny family in the place of the shipped one, with manifests."""
    root = shutil.copytree(tiny_family, tmp_path / "weights")
    for part in root.iterdir():
        write_manifest(part)
    monkeypatch.setattr(components, "EMBEDDED_WEIGHTS", root)
    return root


def load(folder: Path, **options: str) -> components.TextToImage:
    return load_text_to_image(Models(text_to_image=str(folder), **options), "cpu")


def rewrite(file: Path, name: str, change) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})  # as diffusers writes it


def test_loaded_modules_are_frozen_in_eval_mode_and_named_by_their_bytes(tiny_family: Path) -> None:
    model = load(tiny_family / "text_to_image")
    for module in (model.unet, model.vae, model.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert model.sha256["unet"] == file_sha256(tiny_family / "text_to_image" / UNET)
    assert set(model.sha256) == {"unet", "vae", "text_encoder"}
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert model.tokenizer("a red boat")["input_ids"] == clip_tokenizer()("a red boat")["input_ids"]


def test_only_the_unet_takes_the_recipes_dtype(tiny_family: Path) -> None:
    model = load(tiny_family / "text_to_image", dtype="bfloat16")
    assert (model.unet.dtype, model.vae.dtype, model.text_encoder.dtype) == (
        torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(("has_gpu", "auto"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one_and_other_devices_are_taken_literally(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, auto: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert resolve_device().type == auto
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("meta") == torch.device("meta")


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(InputError, match=f"device '{device}' cannot be used .*known are auto, cpu, cuda"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_all_modules_go_to_the_device_that_is_asked_for(tiny_family: Path, device: str | torch.device) -> None:
    models = Models(text_to_image=str(tiny_family / "text_to_image"), clip=str(tiny_family / "clip"))
    model = load_text_to_image(models, device)
    modules = (model.unet, model.vae, model.text_encoder, load_clip(models, device).model)
    assert [{p.device.type for p in module.parameters()} for module in modules] == [{"meta"}] * 4


def test_half_precision_files_are_read_as_float32(own: Path) -> None:
    for file in own.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    config = own / "text_encoder" / "config.json"  # here transformers looks for a dtype when none is asked for
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float16"}))
    model = load(own)
    assert {module.dtype for module in (model.unet, model.vae, model.text_encoder)} == {torch.float32}


def test_folder_with_the_half_precision_variant_alone_is_loaded(own: Path) -> None:
    plain = load(own)
    for file in list(own.rglob("*.safetensors")):
        save_file({name: t.half() for name, t in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    model = load(own)
    assert torch.equal(model.unet.conv_in.weight, plain.unet.conv_in.weight.half().float())
    assert model.sha256["unet"] == file_sha256((own / UNET).with_suffix(".fp16.safetensors"))


def test_weights_in_shards_are_loaded_and_named_by_all_of_them(own: Path) -> None:
    whole = load(own).unet
    (own / UNET).unlink()
    whole.save_pretrained(own / "unet", max_shard_size="200KB")
    assert not (own / UNET).exists()
    sharded = load(own)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.unet.parameters(), strict=True))
    first, *_, last = sorted((own / "unet").glob("*.safetensors"))
    assert sharded.sha256["unet"] not in {file_sha256(first), file_sha256(last)}


def test_tokenizer_is_read_from_vocabulary_and_merges_alone(own: Path) -> None:
    written = json.loads((own / "tokenizer" / "tokenizer.json").read_text())["model"]
    (own / "tokenizer" / "tokenizer.json").unlink()
    (own / "tokenizer" / "vocab.json").write_text(json.dumps(written["vocab"]))
    merges = [" ".join(pair) for pair in written["merges"]]
    (own / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    ids = load(own).tokenizer("a red boat, at night")["input_ids"]
    assert ids == clip_tokenizer()("a red boat, at night")["input_ids"]
    assert len(ids) == 8  # every word is one token, so the merges were read


def test_empty_model_id_is_a_recipe_error_with_the_option_to_set() -> None:
    with pytest.raises(RecipeError, match=r"--set models\.text_to_image=DIR"):
        load_text_to_image(Models(text_to_image=""), "cpu")
    with pytest.raises(RecipeError, match=r"--set models\.clip=DIR"):
        load_clip(Models(clip=""), "cpu")


def test_absent_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; correct models\.text_to_image"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [UNET, "vae/config.json", "scheduler/scheduler_config.json"])
def test_absent_file_of_a_component_is_refused_by_name(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        load(own)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_json_of_a_component_is_refused_by_name(own: Path, name: str) -> None:
    (own / name).write_text('{"cut": ')
    with pytest.raises(CheckpointError, match=f"{name}: not readable as JSON .*; fetch"):
        load(own)


def test_absent_tokenizer_is_refused_by_name(own: Path) -> None:
    shutil.rmtree(own / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer: cannot be loaded"):
        load(own)


def test_truncated_weights_are_refused_by_name_with_both_sizes(own: Path) -> None:
    whole = (own / UNET).read_bytes()
    (own / UNET).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{UNET}: found {len(whole) - 100} bytes, expected {len(whole)}"):
        load(own)


def test_pickled_weights_are_never_opened(own: Path) -> None:
    (own / UNET).rename(own / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin: found pickled weights"):
        load(own)


def test_weights_with_nan_are_refused_by_file_and_tensor(own: Path) -> None:
    rewrite(own / UNET, "conv_in.bias", lambda bias: bias * float("nan"))
    with pytest.raises(CheckpointError, match=rf"{UNET}: conv_in\.bias has 16 values that are NaN"):
        load(own)


def test_weights_of_another_shape_are_refused_by_file(own: Path) -> None:
    rewrite(own / UNET, "conv_in.bias", lambda bias: torch.cat([bias, bias]))
    with pytest.raises(CheckpointError, match=rf"{UNET}: cannot be loaded \(.*shape"):
        load(own)


def test_missing_tensor_is_refused_by_its_name(own: Path) -> None:
    tensors = load_file(own / UNET)
    del tensors["conv_in.bias"]
    save_file(tensors, own / UNET)
    with pytest.raises(
        CheckpointError, match=rf"{UNET}: 1 tensors of config\.json are missing, the first conv_in\.bias"
    ):
        load(own)


def test_edit_model_is_refused_with_its_channels(own: Path) -> None:
    tiny_unet(in_channels=8).save_pretrained(own / "unet")
    with pytest.raises(CheckpointError, match=r"unet: found in_channels 8, expected 4 \(this is an edit model"):
        load(own)


def test_unet_of_another_vae_is_refused_and_not_called_an_edit_model(own: Path) -> None:
    tiny_unet(in_channels=9).save_pretrained(own / "unet")
    with pytest.raises(CheckpointError, match="unet: found in_channels 9, expected 4; use a UNet made for this VAE"):
        load(own)


def test_text_encoder_of_another_width_is_refused(own: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    CLIPTextModel(config).save_pretrained(own / "text_encoder")
    with pytest.raises(CheckpointError, match="found cross_attention_dim 32, expected 16"):
        load(own)


@pytest.mark.parametrize("found", ["flow", "sample"])
def test_unknown_prediction_type_is_refused_by_name(own: Path, found: str) -> None:
    (own / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": found}))
    with pytest.raises(
        CheckpointError, match=rf"scheduler_config\.json: found prediction_type '{found}', expected epsilon"
    ):
        load(own)


@pytest.mark.parametrize("config", [{}, {"prediction_type": "epsilon"}])
def test_scheduler_that_names_no_prediction_type_predicts_the_noise(tmp_path: Path, config: dict[str, str]) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    assert read_scheduler_config(tmp_path / "scheduler_config.json") == config


def test_a_folder_that_has_a_manifest_is_verified_against_it(own: Path) -> None:
    write_manifest(own)
    rewrite(own / UNET, "conv_in.bias", lambda bias: bias + 1)
    with pytest.raises(CheckpointError, match=f"{UNET}: found sha256 .*; fetch the file again"):
        load(own)


def test_shipped_weights_lie_beside_the_code_whatever_the_working_folder_is() -> None:
    assert Path(ip2p.__file__).resolve().parent / "postcards" / "weights" == components.EMBEDDED_WEIGHTS


def test_embedded_parts_are_verified_before_they_are_loaded(embedded: Path) -> None:
    assert load_text_to_image(Models(), "cpu").unet.config.in_channels == 4
    assert load_clip(Models(), "cpu").image_size == 16
    assert embedded_folder("triplet_lm") == embedded / "triplet_lm"
    rewrite(embedded / "text_to_image" / UNET, "conv_in.bias", lambda bias: bias + 1)
    with pytest.raises(CheckpointError, match=rf"{UNET}: found sha256 .*make weights"):
        load_text_to_image(Models(), "cpu")


def test_embedded_part_that_is_not_there_is_refused_with_the_remedy(embedded: Path) -> None:
    shutil.rmtree(embedded / "clip")
    with pytest.raises(
        CheckpointError, match="clip: no such folder, expected the embedded weights; run `make weights`"
    ):
        load_clip(Models(), "cpu")


def test_clip_folder_brings_its_own_tokenizer_size_and_normalisation(tiny_family: Path) -> None:
    clip = load_clip(Models(clip=str(tiny_family / "clip")), "cpu")
    assert clip.image_size == 16
    assert clip.mean == (0.48, 0.46, 0.41)
    assert clip.std == (0.27, 0.26, 0.28)
    assert clip.tokenizer(["a red boat"]).shape == (1, 77)
    assert clip.tokenizer(["a red boat"])[0, :5].tolist() == clip_tokenizer()("a red boat")["input_ids"]
    assert clip.sha256 == file_sha256(tiny_family / "clip" / "open_clip_model.safetensors")
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


@pytest.mark.parametrize("name", ["open_clip_pytorch_model", "model"])
def test_clip_folder_may_use_any_of_open_clips_file_names(own_clip: Path, name: str) -> None:
    file = own_clip / f"{name}.safetensors"
    (own_clip / "open_clip_model.safetensors").rename(file)
    clip = load_clip(Models(clip=str(own_clip)), "cpu")
    assert clip.sha256 == file_sha256(file)
    assert torch.equal(clip.model.ln_final.weight, load_file(file)["ln_final.weight"])


def test_clip_folder_without_its_config_is_refused_by_name(own_clip: Path) -> None:
    (own_clip / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json: no such file"):
        load_clip(Models(clip=str(own_clip)), "cpu")


def test_clip_weights_are_refused_when_truncated_pickled_or_absent(own_clip: Path) -> None:
    file = own_clip / "open_clip_model.safetensors"
    models = Models(clip=str(own_clip))
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match=rf"open_clip_model\.safetensors: found {len(whole) - 9} bytes"):
        load_clip(models, "cpu")
    file.rename(own_clip / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"open_clip_pytorch_model\.bin: found pickled weights"):
        load_clip(models, "cpu")
    (own_clip / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors: no such file"):
        load_clip(models, "cpu")


def test_clip_weights_with_nan_or_of_another_shape_are_refused(own_clip: Path) -> None:
    file = own_clip / "open_clip_model.safetensors"
    rewrite(file, "ln_final.bias", lambda bias: bias * float("nan"))
    with pytest.raises(CheckpointError, match=r"ln_final\.bias has 32 values that are NaN"):
        load_clip(Models(clip=str(own_clip)), "cpu")
    rewrite(file, "ln_final.bias", lambda bias: torch.zeros(3))
    with pytest.raises(CheckpointError, match="own_clip: cannot be loaded"):
        load_clip(Models(clip=str(own_clip)), "cpu")


def test_clip_by_name_needs_a_known_name_and_a_known_tag_or_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither a folder nor an open_clip model name"):
        load_clip(Models(clip="ViT-Z-99"), "cpu")
    with pytest.raises(RecipeError, match=r"tag of ViT-B-32 \(known: .*openai"):
        load_clip(Models(clip="ViT-B-32", clip_pretrained="nonsense"), "cpu")
    (tmp_path / "weights.pt").write_bytes(b"pickle")
    with pytest.raises(RecipeError, match=r"neither a \.safetensors file nor a tag"):
        load_clip(Models(clip="ViT-B-32", clip_pretrained=str(tmp_path / "weights.pt")), "cpu")


def test_clip_by_name_asks_open_clip_for_the_recipes_tag() -> None:
    name, pretrained, *_ = find_clip(Models(clip="ViT-B-32", clip_pretrained="laion2b_e16"))
    assert (name, pretrained) == ("ViT-B-32", "laion2b_e16")


def test_clip_by_name_loads_a_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    small = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.factory._MODEL_CONFIGS["small"] = small
    model = open_clip.CLIP(**small)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.v2.safetensors")
    models = Models(clip="small", clip_pretrained=str(tmp_path / "w.v2.safetensors"))
    clip = load_clip(models, "cpu")
    assert torch.equal(clip.model.ln_final.weight, model.ln_final.weight)
    assert torch.equal(clip.model.token_embedding.weight, model.token_embedding.weight)
    assert clip.tokenizer(["a boat"]).shape == (1, 77)
    assert clip.sha256 == file_sha256(tmp_path / "w.v2.safetensors")


@pytest.fixture
def own_edit(own: Path) -> Path:
    """A private copy whose UNet takes the image's latent too."""
    shutil.rmtree(own / "unet")
    tiny_unet(in_channels=8).save_pretrained(own / "unet")
    return own


def test_edit_model_is_loaded_frozen_and_by_default_shows_images_unscaled(own_edit: Path) -> None:
    model = load_edit_model(own_edit, "bfloat16", "cpu")
    assert (model.unet.dtype, model.vae.dtype, model.text_encoder.dtype) == (
        torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip
    assert model.unet.config.in_channels == 8
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    assert model.sha256["unet"] == file_sha256(own_edit / UNET)
    assert model.image_latent_scaled is False


def test_text_to_image_model_is_refused_as_an_edit_model_with_what_to_do(own: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unet: found in_channels 4, expected 8 .*text-to-image model; train"):
        load_edit_model(own, device="cpu")


def test_unet_of_no_known_width_is_refused(own: Path) -> None:
    shutil.rmtree(own / "unet")
    tiny_unet(in_channels=9).save_pretrained(own / "unet")
    with pytest.raises(CheckpointError, match="found in_channels 9, expected 8; use a UNet made for this VAE"):
        load_edit_model(own, device="cpu")


def test_edit_model_has_the_refusals_of_every_folder(own_edit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; correct --ckpt"):
        load_edit_model(tmp_path / "nowhere", device="cpu")
    with pytest.raises(RecipeError, match="--ckpt is empty"):
        load_edit_model("", device="cpu")
    (tmp_path / "model.ckpt").write_bytes(b"a file")
    with pytest.raises(CheckpointError, match=r"model\.ckpt: found a file, expected a folder"):
        load_edit_model(tmp_path / "model.ckpt", device="cpu")
    rewrite(own_edit / UNET, "conv_in.bias", lambda bias: bias * float("nan"))
    with pytest.raises(CheckpointError, match=rf"{UNET}: conv_in\.bias has 16 values that are NaN"):
        load_edit_model(own_edit, device="cpu")


def test_shipped_edit_model_that_is_not_there_is_refused_with_the_remedy(embedded: Path) -> None:
    with pytest.raises(CheckpointError, match="edit_model: no such folder, expected the embedded weights; run `make w"):
        load_edit_model(device="cpu")


def test_tokenizer_with_more_words_than_the_text_encoder_knows_is_refused(own: Path) -> None:
    vocabulary = json.loads((own / "tokenizer" / "tokenizer.json").read_text())
    config = json.loads((own / "text_encoder" / "config.json").read_text())
    assert len(vocabulary["model"]["vocab"]) <= config["vocab_size"]
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(own / "tokenizer")
    tokenizer.add_tokens([f"new{i}" for i in range(config["vocab_size"] - len(tokenizer) + 1)])
    tokenizer.save_pretrained(own / "tokenizer")
    with pytest.raises(CheckpointError, match=rf"tokenizer: found {config['vocab_size'] + 1} words, expected at most"):
        load_text_to_image(Models(text_to_image=str(own)), "cpu")
