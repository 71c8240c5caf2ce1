"""Rotary position embedding in config.json: every kind both ways, in both forms, and what is not understood."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nosa_jax.config import ROPE_KINDS, RopeConfig
from nosa_jax.hf.rope_json import parse_rope, render_rope

CONTEXT = 4096
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
numbers = st.floats(0.0625, 1e6)


@st.composite
def settings(draw) -> dict:
    """The fields of any RopeConfig of any kind, for heads of 8."""
    kind = draw(st.sampled_from(ROPE_KINDS))
    fields: dict = {"theta": draw(st.floats(2.0, 1e8)), "kind": kind}
    if kind in ("linear", "llama3", "yarn"):
        fields["factor"] = draw(numbers)
    if kind in ("llama3", "yarn", "longrope"):
        fields["original_max_context"] = draw(st.integers(2, 2**20))
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = draw(st.none() | numbers)
    if kind == "llama3":
        fields["low_freq_factor"], fields["high_freq_factor"] = sorted(
            draw(st.tuples(numbers, numbers).filter(distinct))
        )
    if kind == "yarn":
        fields["beta_slow"], fields["beta_fast"] = sorted(draw(st.tuples(numbers, numbers)))
        fields["truncate"] = draw(st.booleans())
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            fields[name] = draw(st.tuples(*[numbers] * 4))
    return fields


def distinct(pair: tuple[float, float]) -> bool:
    return pair[0] != pair[1]


def parse(raw: dict) -> RopeConfig:
    return parse_rope(json.loads(json.dumps(raw)), CONTEXT)


@given(fields=settings())
def test_parse_inverts_render_in_both_forms(fields):
    rope = RopeConfig(**fields)
    raw = render_rope(rope)
    assert parse(raw) == rope
    scaling = raw.pop("rope_scaling") or {"rope_type": "default"}
    inside = {"rope_parameters": {**scaling, "rope_theta": raw.pop("rope_theta")}}
    assert parse(inside) == rope
    assert parse(inside | {"rope_scaling": scaling}) == rope


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_settings_of_the_other_kinds(key):
    assert parse({key: {"type": "linear", "factor": 2}}) == RopeConfig(kind="linear", factor=2.0)
    # A length that linear does not use; transformers passes over it.
    assert parse({key: {"type": "linear", "factor": 2, "original_max_position_embeddings": 8}}).factor == 2.0
    expected = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_context": 1024}
    assert parse({key: LLAMA3}) == RopeConfig(kind="llama3", **expected)
    assert parse({key: YARN}) == RopeConfig(kind="yarn", factor=4.0, original_max_context=1024)
    full = YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5, "mscale": 3}
    assert parse({key: full}) == RopeConfig(
        kind="yarn",
        factor=4.0,
        original_max_context=1024,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        attention_factor=1.5,
    )


def test_what_is_absent_or_null():
    defaults = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"))
    assert parse({"rope_scaling": YARN | defaults}) == parse({"rope_scaling": YARN})
    stretch = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    assert parse({"rope_scaling": stretch}).factor == CONTEXT / 1024
    assert parse({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}).original_max_context == CONTEXT
    beside = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 512}
    assert parse(beside).original_max_context == 512


def test_scales_of_yarn_become_its_attention_factor():
    factor = lambda **scales: parse({"rope_scaling": YARN | scales}).attention_factor
    scale = lambda m: 0.1 * m * math.log(4.0) + 1
    assert factor(mscale=0.7, mscale_all_dim=1.5) == scale(0.7) / scale(1.5)
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=0.7) is factor(mscale_all_dim=0.7) is factor(mscale=0.7, mscale_all_dim=0) is None
    assert factor(mscale=0.7, mscale_all_dim=1.5, attention_factor=2.0) == 2.0


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"type": "linear"}, "linear needs .'factor'."),
        ({"type": "linear", "factor": None}, "linear needs .'factor'."),
        ({"type": "linear", "factor": 2.0, "attention_factor": 1.5}, "settings of a linear rope"),
        ({"type": "linear", "factor": 0}, "factor: must be a finite number above 0"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor 1"),
        ({key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, "llama3 needs .'low_freq_factor'."),
        (LLAMA3 | {"high_freq_factor": 1.0}, "rope_scaling: .*high_freq_factor: must be above low_freq_factor"),
        (LLAMA3 | {"beta_fast": 32}, "settings of a llama3 rope"),
        (LLAMA3 | {"factor": "8"}, "factor: must be a finite number"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"rope_type": "yarn"}, "yarn needs .'factor'."),
        (YARN | {"truncate": None}, "truncate: .*must be true or false"),
        (YARN | {"truncate": 0}, "truncate: .*must be true or false"),
        (YARN | {"beta_fast": 0}, "beta_fast: must be a finite number above 0"),
        (YARN | {"beta_fast": 1, "beta_slow": 32}, "beta_fast: must be at least beta_slow"),
        (YARN | {"mscale": "1", "mscale_all_dim": 1}, "mscale: must be a finite number"),
        (YARN | {"mscale": -9, "mscale_all_dim": 1}, "mscale / mscale_all_dim: must be a finite number above 0"),
        (YARN | {"finetuned": True}, "settings of a yarn rope"),
        (YARN | {"type": "linear"}, "rope_type and type must say the same"),
        ({"rope_type": "dynamic", "factor": 2.0}, "must be one of .*'llama3'.*got 'dynamic'"),
        ({"rope_type": "mrope", "mrope_section": [1]}, "got 'mrope'"),
        ({"type": "su"}, "got 'su'"),
    ],
)
def test_what_is_not_understood_is_refused(rope, named):
    with pytest.raises(ValueError, match=rf"config\.json: .*{named}"):
        parse({"rope_scaling": rope})
