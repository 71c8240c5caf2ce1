"""Rotary position embedding, plain and longrope.

Frequencies are computed by numpy while tracing, in one fixed order of float64 and float32 steps: one ulp of a frequency
is 4e-4 rad at position 8192, so the same formula under jit would not reproduce a checkpoint's own numbers.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from nosa_jax.config import ModelConfig, RopeConfig
from pallas_kernels.formulas import rotate as rotate


@functools.cache
def inverse_frequencies(rope: RopeConfig, head_dim: int, max_context: int) -> np.ndarray:
    """[D/2] float32. longrope divides by its long factors iff the model was configured beyond the original context."""
    exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)
    frequencies = np.float32(1.0) / np.power(np.float64(rope.theta), exponents).astype(np.float32)
    if rope.kind == "longrope":
        assert rope.original_max_context is not None
        factors = rope.long_factor if max_context > rope.original_max_context else rope.short_factor
        powers = np.power(np.float64(rope.theta), exponents).astype(np.float32)
        frequencies = np.float32(1.0) / (np.asarray(factors, np.float32) * powers)
    frequencies.setflags(write=False)
    return frequencies


def attention_factor(rope: RopeConfig, max_context: int) -> float:
    """What cos and sin are multiplied by: as given, or sqrt(1 + log(max / original) / log(original)) where max is
    beyond the original context, else 1."""
    if rope.kind == "plain":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    assert rope.original_max_context is not None
    ratio = max_context / rope.original_max_context
    return math.sqrt(1 + math.log(ratio) / math.log(rope.original_max_context)) if ratio > 1 else 1.0


def cos_sin(
    positions: Int32[Array, "B T"], rope: RopeConfig, head_dim: int, max_context: int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """float32 cos and sin of position * frequency, times the attention factor."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(rope, head_dim, max_context)
    factor = np.float32(attention_factor(rope, max_context))
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def of_positions(
    config: ModelConfig, positions: Int32[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """`cos_sin` of a model."""
    return cos_sin(positions, config.rope, config.head_dim, config.max_context)
