"""Rotary position embedding of all kinds of `RopeConfig`.

Frequencies are computed by numpy while tracing, in one fixed order of float64 and float32 steps: one ulp of a frequency
is 4e-4 rad at position 8192, so the same formula under jit would not reproduce a checkpoint's own numbers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from nosa_jax.config import ModelConfig, RopeConfig
from pallas_kernels.formulas import rotate as rotate


@functools.cache
def inverse_frequencies(rope: RopeConfig, head_dim: int, max_context: int) -> np.ndarray:
    """[D/2] float32, radians per position. max_context decides between the factors of longrope."""
    exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)
    powers = np.power(np.float64(rope.theta), exponents).astype(np.float32)
    frequencies = _by_kind(rope, powers, max_context)
    frequencies.setflags(write=False)
    return frequencies


def _by_kind(rope: RopeConfig, powers: np.ndarray, max_context: int) -> np.ndarray:
    """The frequencies of powers of theta, which are those of plain rope inverted."""
    one = np.float32(1.0)
    if rope.kind == "linear":
        return one / powers / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, one / powers)
    if rope.kind == "yarn":
        whole = one - _yarn_ramp(rope, len(powers))  # how much of a frequency stays as it is
        return one / (np.float32(rope.factor) * powers) * (one - whole) + one / powers * whole
    if rope.kind == "longrope":
        assert rope.original_max_context is not None
        factors = rope.long_factor if max_context > rope.original_max_context else rope.short_factor
        return one / (np.asarray(factors, np.float32) * powers)
    return one / powers


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    original = rope.original_max_context
    assert factor is not None and low is not None and high is not None and original is not None
    # 1 / x * c is not c / x in float32, and is what checkpoints of this kind were made with.
    wavelengths = np.float32(1.0) / frequencies * np.float32(2 * math.pi)
    turns = np.float32(1.0) / wavelengths * np.float32(original)  # in the original context
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1.0) - smooth) * frequencies / np.float32(factor) + smooth * frequencies
    long, short = wavelengths > np.float32(original / low), wavelengths < np.float32(original / high)
    return np.where(long, frequencies / np.float32(factor), np.where(short, frequencies, between))


def _yarn_ramp(rope: RopeConfig, pairs: int) -> np.ndarray:
    """float32 [pairs]: 0 for pairs that turn often in the original context, 1 for those that hardly turn."""
    assert rope.original_max_context is not None
    # The pair, not rounded, that turns so many times in the original context.
    pair = lambda turns: (
        2 * pairs * math.log(rope.original_max_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
    )
    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # sic: of dimensions, not of pairs
    last += 0.001 * (first == last)  # a step, then
    ramp = (np.arange(pairs, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    return np.clip(ramp, np.float32(0.0), np.float32(1.0))


def attention_factor(rope: RopeConfig, max_context: int) -> float:
    """What cos and sin are multiplied by; 1 but for yarn and longrope, see `RopeConfig.attention_factor`."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":
        assert rope.factor is not None
        return yarn_attention_factor(rope.factor)
    assert rope.original_max_context is not None
    ratio = max_context / rope.original_max_context
    return math.sqrt(1 + math.log(ratio) / math.log(rope.original_max_context)) if ratio > 1 else 1.0


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """1 + scale log(factor) / 10, 1 for factors up to 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


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


class Rotations(NamedTuple):
    """cos, sin: float32 [S, D/2] of every position, as `cos_sin` makes them."""

    cos: Float[Array, "S half"]
    sin: Float[Array, "S half"]

    def turn(self, x: Float[Array, "*rows D"], positions: Int32[Array, "*#rows"]) -> Float[Array, "*rows D"]:
        """Rotates each x at its position; positions beyond the tables count as their ends."""
        at = jnp.clip(positions, 0, self.cos.shape[0] - 1)
        cos, sin = (jnp.broadcast_to(table[at], (*x.shape[:-1], table.shape[1])) for table in self)
        return rotate(x[..., None, :], cos, sin)[..., 0, :]
