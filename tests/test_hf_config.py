"""config.json: what is read from the forms found in the wild, what is refused, what is written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from nosa_jax.config import AttentionConfig, RopeConfig
from nosa_jax.hf.config_json import parse_config, render_config
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
        ({"model_type": "mistral"}, "model_type must be 'llama', got 'mistral'"),
        ({"model_type": "absent"}, "model_type must be 'llama', got None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope type .* got 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type .* got 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type .* got 'yarn'"),
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
    with pytest.raises(ValueError, match="attention_bias=True, mlp_bias=True, hidden_act='relu'"):
        parse(attention_bias=True, mlp_bias=True, hidden_act="relu")


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


@pytest.mark.parametrize("name", ["qkv_bias", "qk_norm"])
def test_a_model_beyond_llamas_form_is_not_written(name):
    with pytest.raises(ValueError, match=rf"model.config.{name}: must be False in a folder of Llama's form, got True"):
        render_config(dataclasses.replace(tiny(), **{name: True}), "float32")


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
