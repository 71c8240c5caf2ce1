"""A dense model with a KV head for every query head: the same function, and group-size times the bytes of its cache.

The published comparison with ArkVale repeats keys and values so; here it is for the record (`rivals.speed`, a run with
`:repeated`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nosa_jax import NosaLM, with_attention


def repeated_heads(model: NosaLM) -> NosaLM:
    """The model with K = N; it gives the same logits. Raises ValueError for one whose selections would change."""
    config = model.config
    if config.attention.is_sparse:
        raise ValueError(f"model: must be dense, which variant {config.attention.variant!r} is not.")
    changed = with_attention(model)
    changed.config = dataclasses.replace(config, num_kv_heads=config.num_heads)
    attention = changed.layers.attention
    attention.qkv = nnx.Param(_repeated(attention.qkv[...]))
    if attention.qkv_bias is not None:
        attention.qkv_bias = nnx.Param(_repeated(attention.qkv_bias[...]))
    return changed


def _repeated(grouped: Float[Array, "*rows K G_plus_2 D"]) -> Float[Array, "*rows N three D"]:
    """Each query head with a key and a value head of its own."""
    q, kv = grouped[..., :-2, :], grouped[..., -2:, :]
    *rows, kv_heads, group, dim = q.shape
    kv = jnp.broadcast_to(kv[..., None, :, :], (*rows, kv_heads, group, 2, dim))
    return jnp.concatenate([q[..., None, :], kv], axis=-2).reshape(*rows, kv_heads * group, 3, dim)
