"""Rotary frequencies: what each kind does to those of plain RoPE, and which settings are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nosa_jax.config import RopeConfig
from nosa_jax.rope import attention_factor, inverse_frequencies

LLAMA3 = {"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_context": 128}
YARN = {"kind": "yarn", "original_max_context": 128}


def frequencies(**fields) -> np.ndarray:
    return inverse_frequencies(RopeConfig(**fields), 64, 512)


@given(
    kind=st.sampled_from([{"kind": "linear"}, LLAMA3, YARN, {**YARN, "truncate": False, "beta_slow": 2.0}]),
    factor=st.floats(1.0, 64.0),
    theta=st.floats(1000.0, 1e7),
)
def test_frequencies_lie_between_plain_and_fully_stretched_ones(kind, factor, theta):
    plain, ours = frequencies(theta=theta), frequencies(theta=theta, factor=factor, **kind)
    assert ours.dtype == np.float32 and np.all(np.diff(ours) < 0)
    assert np.all(ours <= plain * (1 + 1e-6)) and np.all(ours >= plain / factor * (1 - 1e-6))


@pytest.mark.parametrize("kind", [{"kind": "linear"}, LLAMA3, YARN], ids=lambda kind: kind["kind"])
def test_a_factor_of_one_changes_nothing(kind):
    np.testing.assert_allclose(frequencies(factor=1.0, **kind), frequencies(), rtol=2e-7)


def test_which_pairs_llama3_and_yarn_stretch():
    plain = frequencies()
    turns = 128 * plain / (2 * math.pi)  # in the original context
    llama3 = plain / frequencies(factor=8.0, **LLAMA3)
    np.testing.assert_array_equal(llama3[turns > 4], 1.0)
    np.testing.assert_array_equal(llama3[turns < 1], 8.0)
    between = llama3[(turns > 1) & (turns < 4)]
    assert len(between) and np.all((between > 1) & (between < 8))
    yarn = plain / frequencies(factor=8.0, beta_fast=4.0, beta_slow=1.0, truncate=False, **YARN)
    np.testing.assert_allclose(yarn[turns > 4], 1.0, rtol=3e-7)
    np.testing.assert_allclose(yarn[turns < 1], 8.0, rtol=3e-7)
    # Truncated, the ramp begins at the whole pair before and ends at the one after.
    whole = plain / frequencies(factor=8.0, beta_fast=4.0, beta_slow=1.0, **YARN)
    assert (np.abs(whole - 1) < 1e-6).sum() <= (np.abs(yarn - 1) < 1e-6).sum()
    assert (whole < 7.99).sum() >= (yarn < 7.99).sum() and not np.array_equal(whole, yarn)


def test_attention_factors():
    yarn = RopeConfig(factor=8.0, **YARN)
    assert attention_factor(yarn, 512) == 0.1 * math.log(8.0) + 1
    assert attention_factor(RopeConfig(factor=0.5, **YARN), 512) == 1.0
    assert attention_factor(RopeConfig(factor=8.0, attention_factor=1.5, **YARN), 512) == 1.5
    for fields in ({"kind": "linear"}, LLAMA3):
        assert attention_factor(RopeConfig(factor=8.0, **fields), 512) == 1.0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "linear"}, "linear needs factor, got factor=None"),
        ({"kind": "llama3", "factor": 8.0}, "llama3 needs .*, got low_freq_factor=None, high_freq_factor=None"),
        ({"kind": "yarn", "factor": 8.0}, "yarn needs factor, original_max_context, got original_max_context=None"),
        ({"factor": 8.0}, "RopeConfig.factor: has no meaning for kind 'plain', got 8.0"),
        (
            {"kind": "linear", "factor": 8.0, "attention_factor": 1.0},
            "attention_factor: has no meaning for kind 'linear'",
        ),
        ({"kind": "linear", "factor": 8.0, "beta_fast": 16.0}, "beta_fast: has no meaning for kind 'linear'"),
        ({"factor": 8.0, **LLAMA3, "truncate": False}, "truncate: has no meaning for kind 'llama3'"),
        ({"factor": 8.0, **LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor: must be above low_freq_factor"),
        ({"factor": 8.0, **YARN, "beta_slow": 33.0}, "beta_fast: must be at least beta_slow, got 32.0 and 33.0"),
        ({"factor": 8.0, **YARN, "theta": 1.0}, "theta: must be above 1 for kind 'yarn'"),
        ({"kind": "linear", "factor": 0.0}, "RopeConfig.factor: .*between"),
        ({"factor": 8.0, **YARN, "beta_slow": float("nan")}, "RopeConfig.beta_slow: .*between"),
    ],
)
def test_settings_that_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        RopeConfig(**fields)
