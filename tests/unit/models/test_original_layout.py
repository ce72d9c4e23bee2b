"""The original's tensor names, both ways, and against diffusers' own reader of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_family import clip_tokenizer

from ip2p.errors import CheckpointError, StorageError
from ip2p.models.components import EditModel
from ip2p.models.original_layout import load_original, original_names, original_state, save_original


def small_model(in_channels: int = 8, seed: int = 0) -> EditModel:
    """Stable Diffusion 1.5's topology, 32 to 64 channels wide."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=in_channels, block_out_channels=(32, 32, 64, 64), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=32, attention_head_dim=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
            )
        )
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return EditModel(unet, vae, text_encoder, clip_tokenizer(), {}, {})


@pytest.fixture(scope="module")
def model() -> EditModel:
    return small_model()


@pytest.fixture(scope="module")
def base() -> EditModel:
    """Another model of the same architecture, before widening."""
    return small_model(in_channels=4, seed=1)


@pytest.fixture(scope="module")
def state(model: EditModel) -> dict[str, torch.Tensor]:
    return original_state(model)


def same(ours: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> bool:
    mine = ours.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def same_models(one: EditModel, other: EditModel) -> bool:
    return all(same(getattr(one, part), getattr(other, part).state_dict()) for part in ("unet", "vae", "text_encoder"))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("unet.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
        ("unet.time_embedding.linear_2.bias", "model.diffusion_model.time_embed.2.bias"),
        ("unet.down_blocks.1.resnets.0.conv_shortcut.weight", None),
        ("unet.down_blocks.2.resnets.0.conv_shortcut.bias",
         "model.diffusion_model.input_blocks.7.0.skip_connection.bias"),
        ("unet.down_blocks.0.downsamplers.0.conv.bias", "model.diffusion_model.input_blocks.3.0.op.bias"),
        ("unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight",
         "model.diffusion_model.input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"),
        ("unet.mid_block.resnets.1.time_emb_proj.bias", "model.diffusion_model.middle_block.2.emb_layers.1.bias"),
        ("unet.up_blocks.0.upsamplers.0.conv.bias", "model.diffusion_model.output_blocks.2.1.conv.bias"),
        ("unet.up_blocks.2.upsamplers.0.conv.bias", "model.diffusion_model.output_blocks.8.2.conv.bias"),
        ("unet.up_blocks.3.resnets.2.conv2.weight", "model.diffusion_model.output_blocks.11.0.out_layers.3.weight"),
        ("unet.conv_norm_out.weight", "model.diffusion_model.out.0.weight"),
        ("vae.encoder.down_blocks.2.resnets.0.conv_shortcut.weight",
         "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight"),
        ("vae.decoder.up_blocks.0.upsamplers.0.conv.weight", "first_stage_model.decoder.up.3.upsample.conv.weight"),
        ("vae.decoder.mid_block.attentions.0.to_out.0.bias", "first_stage_model.decoder.mid.attn_1.proj_out.bias"),
        ("vae.encoder.conv_norm_out.bias", "first_stage_model.encoder.norm_out.bias"),
        ("vae.quant_conv.weight", "first_stage_model.quant_conv.weight"),
    ],
)  # fmt: skip
def test_names_are_those_of_the_released_files(model: EditModel, ours: str, theirs: str | None) -> None:
    assert original_names(model).get(ours) == theirs


def test_names_of_the_text_encoder_have_the_prefix_of_the_released_files(model: EditModel) -> None:
    texts = {name for name in original_names(model).values() if name.startswith("cond_stage")}
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in texts
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in texts
    assert len(texts) == len(model.text_encoder.state_dict())


def test_no_two_tensors_share_a_name(model: EditModel, state: dict[str, torch.Tensor]) -> None:
    assert len(state) == sum(len(getattr(model, part).state_dict()) for part in ("unet", "vae", "text_encoder"))


def test_diffusers_reads_the_same_tensors_out_of_the_file(model: EditModel, state: dict[str, torch.Tensor]) -> None:
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    assert same(model.unet, convert_ldm_unet_checkpoint(dict(state), model.unet.config))
    assert same(model.vae, convert_ldm_vae_checkpoint(dict(state), model.vae.config))
    texts = convert_ldm_clip_checkpoint(dict(state))
    assert same(model.text_encoder, {name.removeprefix("text_model."): tensor for name, tensor in texts.items()})


def test_attention_of_the_autoencoder_is_written_as_convolutions(state: dict[str, torch.Tensor]) -> None:
    assert state["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert state["first_stage_model.encoder.mid.attn_1.norm.weight"].shape == (64,)


def test_written_file_is_read_back_as_the_same_model(model: EditModel, base: EditModel, tmp_path: Path) -> None:
    save_original(model, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_original(tmp_path / "model.safetensors", base)
    assert same_models(loaded, model)
    assert loaded.unet.config.in_channels == 8
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
    assert not loaded.unet.training
    assert not same_models(base, small_model(in_channels=4))  # the base's own weights are untouched


def test_a_scaled_image_latent_goes_into_the_weights(model: EditModel) -> None:
    import dataclasses

    scaled = original_state(dataclasses.replace(model, image_latent_scaled=True))
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(scaled[key][:, 4:], model.unet.conv_in.weight[:, 4:] * model.vae.config.scaling_factor)


def lightning_file(path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the original's trainer saves: tensors under ``state_dict``, beside them a class of Lightning's as a key."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"state_dict": state, "callbacks": {module.ModelCheckpoint: {"best": 1.0}}, "epoch": 3}, path)
    return path


def test_ckpt_of_the_originals_trainer_is_read_without_running_its_code(
    model: EditModel, base: EditModel, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"betas": torch.zeros(3), "model_ema.decay": torch.tensor(0.9999)}
    path = lightning_file(tmp_path / "epoch.ckpt", {**state, **more}, monkeypatch)
    assert same_models(load_original(path, base), model)


def test_moving_averages_are_preferred(
    model: EditModel, base: EditModel, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    prefix = "model.diffusion_model."
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): tensor + 1
        for name, tensor in state.items() if name.startswith(prefix)
    }  # fmt: skip
    torch.save({**state, **averages}, tmp_path / "averaged.ckpt")
    loaded = load_original(tmp_path / "averaged.ckpt", base)
    assert torch.equal(loaded.unet.conv_out.bias, model.unet.conv_out.bias + 1)
    assert same(loaded.vae, model.vae.state_dict())
    del averages["model_ema.diffusion_modelout2bias"]
    torch.save({**state, **averages}, tmp_path / "averaged.ckpt")
    with pytest.raises(CheckpointError, match=r"averaged\.ckpt: model_ema\.diffusion_modelout2bias is missing"):
        load_original(tmp_path / "averaged.ckpt", base)


def test_pickle_that_would_run_code_is_refused(base: EditModel, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "ran", "code")

    torch.save({"state_dict": {"a": torch.zeros(1)}, "evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt: cannot be read as tensors only"):
        load_original(tmp_path / "evil.ckpt", base)
    assert not (tmp_path / "ran").exists()


def test_truncated_files_are_refused_by_name(model: EditModel, base: EditModel, tmp_path: Path) -> None:
    save_original(model, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "model.ckpt")
    for name in ("model.safetensors", "model.ckpt"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_original(path, base)


def refused(state: dict[str, torch.Tensor], base: EditModel, path: Path, match: str) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    with pytest.raises(CheckpointError, match=match):
        load_original(path, base)


def test_missing_tensors_other_shapes_and_other_layouts_are_refused_by_name(
    base: EditModel, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path, bias = tmp_path / "file.safetensors", "first_stage_model.quant_conv.bias"
    first, linear = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.time_embed.0.weight"
    refused({k: v for k, v in state.items() if k != bias}, base, path, rf"file\.safetensors: {bias} is missing")
    refused({**state, bias: torch.zeros(9)}, base, path, rf"{bias} has shape \(9,\), expected \(8,\)")
    turned = {**state, linear: state[linear].T}
    refused(turned, base, path, rf"{linear} has shape \(32, 128\), expected \(128, 32\)")
    refused({"conv_in.weight": torch.zeros(1)}, base, path, "expected the original's layout")
    refused({**state, first: state[first][:, :4]}, base, path, "4 input channels, expected 8; .*train first")
    refused({**state, bias: state[bias] * float("nan")}, base, path, r"quant_conv\.bias has 8 values that are NaN")


def test_other_kinds_of_files_are_refused_by_name(base: EditModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.zip: expected a name that ends in \.safetensors"):
        load_original(tmp_path / "model.zip", base)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match=r"list\.ckpt: found a list, expected a table of tensors"):
        load_original(tmp_path / "list.ckpt", base)


def test_half_precision_files_are_read_as_float32(
    base: EditModel, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    assert load_original(tmp_path / "half.safetensors", base).unet.dtype == torch.float32
    assert load_file(tmp_path / "half.safetensors")["model.diffusion_model.out.2.bias"].dtype == torch.float16


def test_models_beyond_stable_diffusion_1_have_no_name_there() -> None:
    from ip2p.models.original_layout import unet_names

    with pytest.raises(CheckpointError, match=r"add_embedding\.linear_1\.bias: found a tensor that Stable Diffusion 1"):
        unet_names(["down_blocks.0.resnets.0.norm1.bias", "add_embedding.linear_1.bias"])


def test_file_that_cannot_be_written_leaves_nothing(model: EditModel, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(StorageError, match=r"model\.safetensors: cannot be written"):
        save_original(model, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
