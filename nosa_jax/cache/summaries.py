"""What the selection reads of a cache: pooled keys and importance, kept up to date and read.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar: a slice of a large one would be a copy.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.attention.importance import Importance
from nosa_jax.attention.selection import select
from nosa_jax.cache.state import DecodeState
from nosa_jax.config import AttentionConfig
from pallas_kernels import Summaries, Token, append_summaries, append_token, blocks


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
    after = append_summaries(_summaries(state), k, importance, state.lengths, count, layer, stride=stride)
    return dataclasses.replace(state, **after._asdict())


def read_token(
    config: AttentionConfig,
    state: DecodeState,
    qkv: Float[Array, "B K G_plus_2 D"],
    cos_sin: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    importance: Importance | None,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[DecodeState, Token]:
    """`append_tokens` for one token per row, with what comes before it: the rotation of its queries and key.

    config: of the model's attention.
    state: before the token.
    qkv: of the token, before RoPE.
    cos_sin: float32, of its positions.
    importance: parameters of all layers, None where the variant does not use them.
    positions: of the token, -1 for rows without one.
    layer: which layer.
    """
    scale, delta = (None, None) if importance is None else (importance.A[...], importance.delta[...])
    q, k, v, after = append_token(
        qkv, *cos_sin, scale, delta, _summaries(state), positions, layer, stride=config.pooling_stride
    )
    return dataclasses.replace(state, **after._asdict()), Token(q, k, v)


def select_in(
    config: AttentionConfig,
    state: DecodeState,
    q: Float[Array, "B n N D"],
    positions: Int32[Array, "B n"],
    layer: Int32[Array, ""],
    num_blocks: int | None = None,
) -> Int32[Array, "B K n J"]:
    """The blocks of one layer's cache that each query selects. num_blocks: look at the first ones only; None at all."""
    num_blocks = state.num_blocks if num_blocks is None else num_blocks
    windows = blocks.num_windows(num_blocks * config.block_size, config.pooling_stride)
    pooled_importance = None
    if state.pooled_importance is not None:
        pooled_importance = state.pooled_importance.pooled[layer, :, :, :windows, 0]
    pooled_keys = None if state.pooled_keys is None else state.pooled_keys.pooled
    of_layer: Array | None = layer
    # One query that looks at all of them is not worth a copy of the layer.
    if pooled_keys is not None and (q.shape[1] > 1 or num_blocks < state.num_blocks):
        pooled_keys, of_layer = pooled_keys[layer, :, :, :windows], None
    return select(config, q, pooled_keys, pooled_importance, positions, num_blocks=num_blocks, layer=of_layer)


def bias_of(state: DecodeState, layer: Int32[Array, ""], num_blocks: int) -> Float[Array, "B K tokens"] | None:
    """The bias of every token in the first blocks of one layer's cache, None where there is none."""
    if state.importance is None:
        return None
    bias = state.importance[layer, :, :, :num_blocks]
    return jnp.reshape(bias, (*bias.shape[:2], -1))


def _summaries(state: DecodeState) -> Summaries:
    return Summaries(state.pooled_keys, state.importance, state.pooled_importance)
