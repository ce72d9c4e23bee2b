"""Folders of writers: the note of how to ask them, and what a GGUF file becomes."""

import json

import numpy as np
import pytest
import torch

from ip2p.errors import CheckpointError, InputError
from ip2p.triplets.format import completion_of, prompt_of, split_prompt
from ip2p.triplets.writer_model import NOTE, Manner, gguf_to_folder, load_writer_model, read_manner

CPU = torch.device("cpu")


def test_a_folder_without_a_note_is_asked_in_the_originals_way(random_lm):
    assert read_manner(random_lm) == Manner("original", tasks=False)


@pytest.mark.parametrize("note", ["{", '{"manners": 1}', '{"prompt_format": "xml"}', "[1]"])
def test_a_note_that_says_something_else_is_refused(tmp_path, note):
    (tmp_path / NOTE).write_text(note)
    with pytest.raises(CheckpointError, match=NOTE):
        read_manner(tmp_path)


def test_prompts_name_the_task_only_to_models_that_know_it(random_lm):
    _, tokenizer = load_writer_model(random_lm, CPU)
    prompt = prompt_of("a cat", "add")
    knows, does_not = Manner(tasks=True), Manner(tasks=False)
    assert tokenizer.decode(knows.token_ids(tokenizer, prompt)) == "a cat\n@@\nadd\n##\n"
    assert tokenizer.decode(does_not.token_ids(tokenizer, prompt)) == "a cat\n##\n"


def test_a_prompt_is_split_as_it_was_made():
    assert split_prompt(prompt_of("a cat", "add")) == ("a cat", "add")
    assert split_prompt(prompt_of("a cat")) == ("a cat", "")


def test_the_same_completion_in_any_company(random_lm):
    """Batches by length, and rows that leave early, change nobody's text."""
    from ip2p.config import Triplets
    from ip2p.triplets.language_model import LanguageModelWriter

    writer = LanguageModelWriter(str(random_lm), Triplets(max_tokens=24), 3, "cpu")
    prompts = [prompt_of("a cat " * (n % 5 + 1)) for n in range(12)]
    together = writer.complete(prompts, [(n,) for n in range(12)])
    alone = [writer.complete([prompt], [(n,)])[0] for n, prompt in enumerate(prompts)]
    assert together == alone
    assert len(set(map(len, together))) > 1


# ---- GGUF


def permuted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Queries and keys in the order that llama.cpp keeps them in."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory, random_lm):
    """A tiny Llama, its tokenizer, and the .gguf file of both."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(random_lm)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(400)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(spelled["vocab"], key=spelled["vocab"].get)
    tokens += [f"<unused{n}>" for n in range(400 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in spelled["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(2):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            data = permuted(weight, heads) if heads else weight.numpy()
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer, path


def test_a_gguf_file_becomes_a_folder_with_the_same_model(llama, tmp_path):
    model, tokenizer, path = llama
    gguf_to_folder(path, tmp_path / "model")
    ours, its_tokenizer = load_writer_model(tmp_path / "model", CPU)
    text = prompt_of("a cat on a mat") + completion_of(type("T", (), {"instruction": "x", "edited_caption": "y"}))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert its_tokenizer(text)["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(ours(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    gguf_to_folder(path, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match=r"model\.gguf: transformers cannot read it"):
        gguf_to_folder(tmp_path / "model.gguf", tmp_path / "folder")
