"""What the selection reads of a cache: pooled keys and importance, kept up to date and read.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar: a slice of a large one would be a copy.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.attention.selection import select
from nosa_jax.cache.state import DecodeState
from nosa_jax.config import AttentionConfig
from pallas_kernels import Summaries, append_summaries, blocks


def append_tokens(
    config: AttentionConfig,
    state: DecodeState,
    k: Float[Array, "B K n D"],
    importance: Float[Array, "B K n"] | None,
    count: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> DecodeState:
    """Adds the first `count[b]` new tokens of each row to one layer's summaries. k: after RoPE."""
    stride = config.pooling_stride
    after = append_summaries(summaries_of(state), k, importance, state.lengths, count, layer, stride=stride)
    return dataclasses.replace(state, **after._asdict())


def select_in(
    config: AttentionConfig,
    state: DecodeState,
    q: Float[Array, "B n N D"],
    positions: Int32[Array, "B n"],
    layer: Int32[Array, ""],
    num_blocks: int,
) -> Int32[Array, "B K n J"]:
    """The blocks of one layer's cache that each query selects, among the first `num_blocks`."""
    windows = blocks.num_windows(num_blocks * config.block_size, config.pooling_stride)
    pooled_importance = None
    if state.pooled_importance is not None:
        pooled_importance = state.pooled_importance.pooled[layer, :, :, :windows, 0]
    pooled_keys = None if state.pooled_keys is None else state.pooled_keys.pooled[layer, :, :, :windows]
    return select(config, q, pooled_keys, pooled_importance, positions, num_blocks=num_blocks)


def bias_of(state: DecodeState, layer: Int32[Array, ""], num_blocks: int) -> Float[Array, "B K tokens"] | None:
    """The bias of every token in the first blocks of one layer's cache, None where there is none."""
    if state.importance is None:
        return None
    bias = state.importance[layer, :, :, :num_blocks]
    return jnp.reshape(bias, (*bias.shape[:2], -1))


def summaries_of(state: DecodeState) -> Summaries:
    """The part of the state that ops take as `Summaries`."""
    return Summaries(state.pooled_keys, state.importance, state.pooled_importance)
