"""Llama, Qwen2, Qwen3, Mistral and our own type: what each leaves unsaid, what it is saved as, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from hf_folders import CONFIG, assert_same, edit_config, make_model, raw_config

from nosa_jax.config import AttentionConfig, ModelConfig
from nosa_jax.convert import with_attention
from nosa_jax.hf import from_pretrained, save_pretrained
from nosa_jax.hf.config_json import parse_config, render_config

FULL = dataclasses.replace(CONFIG, attention=AttentionConfig(variant="full"))
SIZES = {
    "vocab_size": 100,
    "hidden_size": 4096,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
QWEN3 = {"qkv_bias": True, "output_bias": True, "qk_norm": True}


def parse(model_type: str, **changes) -> ModelConfig:
    raw = {"model_type": model_type, **SIZES, **changes}
    raw = {key: value for key, value in raw.items() if value != "absent"}
    return parse_config(raw, overrides={}, has_importance=False)


@pytest.mark.parametrize(
    ("model_type", "context", "kv_heads", "head_dim"),
    [("llama", 2048, 64, 64), ("qwen2", 32768, 32, 64), ("qwen3", 32768, 32, 128), ("mistral", 131072, 8, 64)],
)
def test_what_absent_keys_stand_for(model_type, context, kv_heads, head_dim):
    absent = dict.fromkeys(("num_key_value_heads", "max_position_embeddings"), "absent")
    config = parse(model_type, **absent, sliding_window=None)
    assert (config.max_context, config.num_kv_heads, config.head_dim) == (context, kv_heads, head_dim)
    assert (config.rope.theta, config.rms_norm_eps, config.tie_embeddings) == (10000.0, 1e-6, False)
    assert parse(model_type, num_key_value_heads=None, sliding_window=None).num_kv_heads == 64


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("llama", {}, ()),
        ("llama", {"attention_bias": True}, ("qkv_bias", "output_bias")),
        ("qwen2", {}, ("qkv_bias",)),
        ("qwen2", {"attention_bias": True}, ("qkv_bias",)),  # transformers does not read it
        ("qwen3", {"attention_bias": False}, ("qk_norm",)),
        ("qwen3", {"attention_bias": True}, tuple(QWEN3)),
        ("mistral", {"sliding_window": None}, ()),
    ],
)
def test_biases_and_norms_of_each(model_type, keys, expected):
    config = parse(model_type, **keys)
    assert {name for name in QWEN3 if getattr(config, name)} == set(expected)


@pytest.mark.parametrize("extras", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("came_as", [None, "llama", "mistral", "qwen2", "qwen3", "nosa_llama"])
@pytest.mark.parametrize("variant", ["full", "infllmv2"])
def test_what_a_model_is_saved_as(extras, came_as, variant):
    given = dict(zip(QWEN3, extras, strict=True))
    config = dataclasses.replace(CONFIG, **given, attention=AttentionConfig(variant))
    raw = json.loads(json.dumps(render_config(config, "float32", came_as=came_as)))
    assert parse_config(raw, overrides={}, has_importance=False) == config
    plain = {(): "llama", ("qkv_bias",): "qwen2", ("qk_norm",): "qwen3", ("qkv_bias", "output_bias"): "llama"}
    plain[tuple(QWEN3)] = "qwen3"
    expected = plain.get(tuple(name for name in QWEN3 if given[name]), "nosa_llama")
    if came_as == "mistral" and not any(extras):
        expected = "mistral"
    assert raw["model_type"] == (expected if variant == "full" else "nosa_llama")


@pytest.mark.parametrize(
    "extras", [{"qkv_bias": True}, {"qk_norm": True}, QWEN3, {"output_bias": True}, {"qkv_bias": True, "qk_norm": True}]
)
@pytest.mark.parametrize("variant", ["full", "nosa"])
def test_load_inverts_save(tmp_path, extras, variant):
    model = make_model(dataclasses.replace(CONFIG, **extras, attention=AttentionConfig(variant)))
    save_pretrained(model, tmp_path / "out")
    assert_same(from_pretrained(tmp_path / "out"), model)


def test_a_mistral_stays_one_and_its_folder_may_be_replaced(tmp_path):
    folder = tmp_path / "in"
    save_pretrained(make_model(FULL), folder)
    edit_config(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=512, note="mine")
    model = from_pretrained(folder)
    save_pretrained(with_attention(model, variant="full"), folder)
    raw = raw_config(folder)
    assert (raw["model_type"], raw["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert raw["sliding_window"] is None and raw["note"] == "mine"  # an absent window would be one of 4096
    assert_same(from_pretrained(folder), model)
    save_pretrained(make_model(FULL), folder)
    assert raw_config(folder)["model_type"] == "llama" and "sliding_window" not in raw_config(folder)


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8192}),
        ("mistral", {"max_position_embeddings": 4096}),  # where the window that is not said is as long
        ("mistral", {"sliding_window": 10**6, "layer_types": ["sliding_attention"] * 4}),
        ("qwen2", {}),
        ("qwen2", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8192, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}),  # the first 28 layers have none
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 4}),
        ("llama", {"sliding_window": 8192}),
    ],
)
def test_windows_that_hide_nothing_are_fine(model_type, keys):
    assert parse(model_type, **keys).num_layers == 4


@pytest.mark.parametrize(
    ("model_type", "keys", "window"),
    [
        ("mistral", {"sliding_window": 8191}, 8191),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": 4096, "use_sliding_window": False}, 4096),  # transformers does not read it
        ("mistral", {"sliding_window": 4096, "layer_types": ["full_attention"] * 4}, 4096),
        ("mistral", {"sliding_window": "8192"}, "'8192'"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, 4096),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": "4"}, 64),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 29}, 64),
        ("llama", {"sliding_window": 4096, "use_sliding_window": True}, 4096),
    ],
)
def test_real_windows_are_refused_with_what_to_do(model_type, keys, window):
    said = f"every layer must see the whole context, got sliding_window={window} in a context of 8192"
    with pytest.raises(ValueError, match=f"config.json: {said}.*set max_position_embeddings"):
        parse(model_type, **keys)


@pytest.mark.parametrize("types", [["sliding_attention"] * 4, ["linear_attention"] * 4, 3])
def test_layers_of_other_types_are_refused(types):
    for model_type in ("qwen2", "qwen3", "llama"):
        with pytest.raises(ValueError, match="layer_types="):
            parse(model_type, layer_types=types)
    with pytest.raises(ValueError, match="layer_types="):  # also beside a window that hides nothing
        parse("mistral", sliding_window=8192, layer_types=["chunked_attention"])


@pytest.mark.parametrize(
    "model_type",
    ["qwen2_moe", "qwen2_vl", "qwen3_moe", "qwen3_next", "gemma", "gemma2", "mixtral", "ministral", "phi3", "llama4",
     "gpt2", "absent", None, "", "Llama", ["llama"], 3],
)  # fmt: skip
def test_other_architectures_are_refused_with_what_is_supported(model_type):
    with pytest.raises(
        ValueError, match="model_type must be one of 'llama', 'qwen2', 'qwen3', 'mistral', 'nosa_llama', got"
    ):
        parse(model_type)


@pytest.mark.parametrize("own_key", [True, False])
@pytest.mark.parametrize("asked", [{"variant": "nosa"}, {"attention": {"variant": "dma"}}])
def test_a_context_too_short_to_be_sparse_is_said_whichever_way_it_comes(tmp_path, own_key, asked):
    save_pretrained(make_model(dataclasses.replace(FULL, qkv_bias=True)), tmp_path / "out")
    if not own_key:
        edit_config(tmp_path / "out", nosa_attention="absent")
    with pytest.warns(UserWarning, match=r"nothing is sparse.*512.*4096"):
        model = from_pretrained(tmp_path / "out", **asked)
    short = {"num_selected_blocks": 7, "num_local_blocks": 2, "num_query_blocks": 2}
    from_pretrained(tmp_path / "out", attention={**short, "variant": "nosa"})  # 448 of 512 tokens
    save_pretrained(model, tmp_path / "sparse")
    from_pretrained(tmp_path / "sparse")  # which says of itself that it is sparse
