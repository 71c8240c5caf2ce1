"""config.json: what is read from the forms found in the wild, what is refused, what is written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from nosa_jax.config import AttentionConfig, RopeConfig
from nosa_jax.hf.config_json import parse_config, read_config_json, render_config
from nosa_jax.presets import nosa_8b, tiny

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 500000,
}
FACTORS = {"short_factor": [1, 1.5, 2, 2.5], "long_factor": [1, 2, 3, 4]}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS}
LONGROPE = RopeConfig(
    theta=500000.0,
    kind="longrope",
    short_factor=(1.0, 1.5, 2.0, 2.5),
    long_factor=(1.0, 2.0, 3.0, 4.0),
    original_max_context=1024,
)


def parse(**changes):
    raw = {key: value for key, value in (LLAMA | changes).items() if value != "absent"}
    return parse_config(raw, overrides={}, has_importance=True)


def test_fields_of_a_plain_llama():
    config = parse()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (100, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 8, 2, 8)
    assert (config.max_context, config.rms_norm_eps, config.tie_embeddings) == (4096, 1e-6, False)
    assert config.rope == RopeConfig(theta=500000.0)
    assert config.attention == AttentionConfig()


def test_what_may_be_left_out():
    config = parse(num_key_value_heads="absent", rope_theta="absent", rms_norm_eps="absent", hidden_act="absent")
    assert (config.num_kv_heads, config.rope.theta, config.rms_norm_eps) == (8, 10000.0, 1e-6)
    assert parse(head_dim=None).head_dim == 8
    assert parse(head_dim=20).head_dim == 20
    assert parse(tie_word_embeddings=True).tie_embeddings


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_what_may_not_be_left_out(key):
    with pytest.raises(ValueError, match=f"must have the key '{key}'"):
        parse(**{key: "absent"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral", "attention_bias": True}, "plain mistral .*attention_bias=True"),
        ({"model_type": "nosa_llama", "attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8}}, "rope type .* got 'dynamic'"),
        ({"rope_scaling": {"type": "proportional", "factor": 2}}, "rope type .* got 'proportional'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn needs .'factor'."),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_mscale": 2, **FACTORS}}, "short_mscale"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 1, 1, 1]}}, "longrope needs .'long_factor'."),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "head_dim / 2 = 4"),
        ({"nosa_attention": {"variant": "nosa", "topk": 64}}, "nosa_attention: .*'topk'"),
        ({"nosa_attention": "nosa"}, "nosa_attention: must be an object"),
    ],
)
def test_other_maths_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        parse(**changes)


def test_everything_refused_is_named_at_once():
    with pytest.raises(ValueError, match="mlp_bias=True, hidden_act='relu', qkv_bias=True"):
        parse(qkv_bias=True, mlp_bias=True, hidden_act="relu")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": "absent"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": 1.0},
    ],
)
def test_forms_of_plain_rope(changes):
    assert parse(**changes).rope == RopeConfig(theta=500000.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS}},
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1024, "factor": 4.0, **FACTORS}},
        {"rope_scaling": {"rope_type": "longrope", **FACTORS}, "original_max_position_embeddings": 1024},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500000.0,
                "original_max_position_embeddings": 1024,
                **FACTORS,
            },
            "rope_theta": "absent",
        },
    ],
)
def test_forms_of_longrope(changes):
    assert parse(**changes).rope == LONGROPE


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LONG], ids=["default", "longrope"])
def test_theta_in_rope_scaling_must_be_the_one_beside_it(rope):
    for theta in (500000, 500000.0):
        assert parse(rope_scaling=rope | {"rope_theta": theta}).rope.theta == 500000.0
    assert parse(rope_scaling=rope | {"rope_theta": 1e6}, rope_theta="absent").rope.theta == 1e6
    with pytest.raises(ValueError, match=r"rope_scaling: rope_theta must be the same everywhere, got 1000000.0"):
        parse(rope_scaling=rope | {"rope_theta": 1e6})


def test_attention_factor_of_longrope():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS}
    assert parse(rope_scaling={**rope, "attention_factor": 1.25}).rope.attention_factor == 1.25
    stretched = parse(rope_scaling={**rope, "factor": 8.0}).rope.attention_factor
    assert stretched == pytest.approx(math.sqrt(1 + math.log(8) / math.log(1024)))
    assert parse(rope_scaling={**rope, "factor": 1.0}).rope.attention_factor == 1.0
    without_original = parse(rope_scaling={"rope_type": "longrope", **FACTORS}).rope
    assert without_original.original_max_context == 4096


def test_stored_attention_and_overrides():
    raw = LLAMA | {"nosa_attention": {"variant": "infllmv2", "num_selected_blocks": 48}}
    assert parse_config(raw, overrides={}, has_importance=True).attention == AttentionConfig(
        variant="infllmv2", num_selected_blocks=48
    )
    changed = parse_config(raw, overrides={"num_selected_blocks": 40}, has_importance=False).attention
    assert changed == AttentionConfig(variant="infllmv2", num_selected_blocks=40)


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(variant="full"),
        nosa_8b(variant="dma"),
        dataclasses.replace(parse(), rope=LONGROPE),
        dataclasses.replace(parse(), rope=dataclasses.replace(LONGROPE, attention_factor=1.1)),
    ],
)
def test_parse_inverts_render(config):
    raw = json.loads(json.dumps(render_config(config, "bfloat16")))
    assert parse_config(raw, overrides={}, has_importance=False) == config
    assert raw["torch_dtype"] == "bfloat16"


def test_the_written_form_has_every_key_that_llama_code_reads():
    published = json.loads((Path(__file__).parent / "golden/models/tiny_g4/config.json").read_text())
    optional = {
        "attention_dropout",
        "initializer_range",
        "pretraining_tp",
        "use_cache",
        "dtype",
        "transformers_version",
    }
    assert published.keys() - optional <= render_config(tiny(), "float32").keys()


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 4.0},
        {"rope_type": None, "factor": 4.0},
        {"rope_type": "default", "factor": 4.0},
        {"rope_type": "default", "attention_factor": 1.5},
        {"rope_type": "default", **FACTORS},
        {"rope_type": "default", "type": "linear"},
        {"rope_type": "default", "type": "linear", "factor": 4.0},
        {"rope_type": "longrope", "type": "yarn", "original_max_position_embeddings": 1024, **FACTORS},
        {"type": "default", "rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS},
        {"rope_type": ["default"]},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
        [],
        "linear",
        4.0,
        True,
        LONG | {"short_factor": [[1], [1], [1], [1]]},
        LONG | {"short_factor": [1, 1, 1, 0]},
        LONG | {"long_factor": [1, 1, 1, float("nan")]},
        LONG | {"long_factor": ["1", "1", "1", "1"]},
        LONG | {"long_factor": {"a": 1}},
        LONG | {"original_max_position_embeddings": 1},
        LONG | {"original_max_position_embeddings": 1024.5},
        LONG | {"original_max_position_embeddings": "1024"},
        LONG | {"attention_factor": -1},
        LONG | {"attention_factor": "1.0"},
        LONG | {"factor": 0},
        LONG | {"factor": True},
        LONG | {"rope_theta": 0},
        LONG | {"rope_theta": -1.0},
        LONG | {"rope_theta": float("inf")},
    ],
    ids=repr,
)
def test_rope_that_is_not_understood_is_refused(rope):
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=r"config\.json: .*(rope|original_max_position_embeddings)"):
            parse(**{key: rope})


def test_two_statements_about_rope_must_agree():
    assert parse(rope_scaling=LONG, rope_parameters={**LONG, "rope_theta": 500000}).rope == LONGROPE
    for other in (
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "default"},
        {**LONG, "long_factor": [1, 1, 1, 1]},
    ):
        with pytest.raises(ValueError, match="rope"):
            parse(rope_scaling=LONG, rope_parameters=other)
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        parse(rope_scaling=LONG, original_max_position_embeddings=2048)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 1024},
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        {"scale_emb": 12},
        {"scale_depth": 1.4},
        {"dim_model_base": 32},
        {"logit_scale": 0.0625},
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12.0},
        {"attention_multiplier": 0.0078125},
        {"residual_multiplier": 0.22},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"query_pre_attn_scalar": 256},
        {"num_experts": 8},
        {"num_local_experts": 8},
        {"n_routed_experts": 64},
        {"kv_lora_rank": 512},
        {"rope_interleaved": True},
        {"rope_interleave": True},
        {"rotary_pct": 0.25},
        {"rotary_dim": 4},
        {"no_rope_layers": [1, 0, 1]},
        {"use_qk_norm": True},
        {"qk_layernorm": True},
        {"qkv_bias": True},
        {"use_parallel_residual": True},
        {"alibi": True},
        {"position_embedding_type": "alibi"},
        {"clip_qkv": 8.0},
        {"norm_type": "layernorm"},
        {"hidden_activation": "gelu_pytorch_tanh"},
        {"is_encoder_decoder": True},
        {"attention_chunk_size": 8192},
        {"sparse_config": {"topk": 64}},
        {"num_nextn_predict_layers": 1},
        {"scale_depth": 10**400},
        {"attention_multiplier": 10**400},
    ],
    ids=repr,
)
def test_keys_of_other_architectures_are_refused_where_they_change_the_maths(changes):
    (key,) = changes
    with pytest.raises(ValueError, match=rf"config\.json: .*{key}="):
        parse(**changes)


def test_keys_of_other_architectures_pass_where_they_change_nothing():
    parse(
        sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=28,
        layer_types=["full_attention"] * 3,
        scale_emb=1,
        dim_model_base=64,
        scale_depth=math.sqrt(3),
        logit_scale=1.0,
        embedding_multiplier=1.0,
        attention_multiplier=8**-0.5,
        query_pre_attn_scalar=8,
        rotary_dim=8,
        num_experts=0,
        final_logit_softcapping=None,
        rope_interleaved=False,
        no_rope_layers=[1, 1, 1],
        pretraining_tp=1,
        attention_dropout=0.0,
        initializer_range=0.02,
        a_note_of_my_own={"x": 1},
    )


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", [8], 10**400], ids=lambda value: f"{value!r:.8}")
def test_sizes_are_whole_numbers(key, value):
    with pytest.raises(ValueError, match=rf"config\.json: {key}: must be a whole number") as error:
        parse(**{key: value})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", None),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1.0),
        ("rope_theta", "10000"),
        ("rope_theta", 0),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("attention_bias", "false"),
        ("hidden_size", 65),
        ("nosa_attention", {"block_size": "64"}),
        ("nosa_attention", {"variant": ["nosa"]}),
        ("nosa_attention", {"num_local_blocks": 1}),
    ],
)
def test_values_of_the_wrong_kind_are_named(key, value):
    with pytest.raises(ValueError, match=rf"config\.json: .*{key}"):
        parse(**{key: value})


@pytest.mark.parametrize(
    "content",
    [
        '{"a": ' + "9" * 6000 + "}",
        '{"a": ' * 10**5,
        "[" * 10**5,
        '"llama"',
        "\udcff",
        "",
    ],
    ids=["digits", "nested", "lists", "string", "bytes", "empty"],
)
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: must (be valid JSON|hold a JSON object)") as error:
        read_config_json(tmp_path)
    assert len(str(error.value)) < 400
