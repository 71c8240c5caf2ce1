"""Attention over exact tokens and over chunks with rebuilt keys: gather, rebuild, one softmax over both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.formulas import dot, rotate
from pallas_kernels.rebuilt_attention.arguments import Chunks, Exact, Factors


def rebuilt_attention(
    q: Float[Array, "B N D"],
    factors: Factors,
    chunks: Chunks,
    exact: Exact,
    layer: Int32[Array, ""],
    *,
    scale: float,
) -> Float[Array, "B N D"]:
    (batch, heads, dim), (kv_heads, num_slots, size) = q.shape, (chunks.pool.shape[axis] for axis in (2, 3, 5))
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
    valid = (chunks.ids >= 0) & (chunks.ids < factors.tokens.shape[2]) & (chunks.slots >= 0)
    valid &= chunks.slots < num_slots
    ids, slots = (jnp.where(valid, x, 0) for x in (chunks.ids, chunks.slots))
    mask = jnp.repeat(valid, size, axis=2)
    # What nothing listed names may hold NaN.
    values = jnp.where(valid[..., None, None], chunks.pool[layer, row, head, slots, 0], 0)
    tokens = factors.tokens[layer, row, ids].reshape(*mask.shape, factors.tokens.shape[-1])
    positions = (ids[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(mask.shape)
    of_layer = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
    keys = _rebuild(tokens, of_layer(factors.heads), positions, factors)
    there = (jnp.arange(exact.tokens.shape[4], dtype=jnp.int32) < exact.lengths[:, None])[:, None]
    exact_keys, exact_values = (of_layer(exact.tokens)[:, :, i] for i in range(2))
    parts = (
        (exact_keys, jnp.where(there[..., None], exact_values, 0), there),
        (keys, values.reshape(keys.shape), mask),
    )
    out = _attend(q.reshape(batch, kv_heads, heads // kv_heads, dim), parts, scale)
    return out.reshape(batch, heads, dim).astype(q.dtype)


def _rebuild(
    tokens: Float[Array, "B K A r"],
    heads: Float[Array, "B K r D"],
    positions: Int32[Array, "B K A"],
    factors: Factors,
) -> Float[Array, "B K A D"]:
    """Keys after RoPE from their factors, in the dtype of these; positions beyond the tables count as their end."""
    keys = dot("bkar,bkrd->bkad", tokens, heads)
    at = jnp.minimum(positions, factors.cos.shape[0] - 1)
    return rotate(keys[..., None, :], factors.cos[at], factors.sin[at])[..., 0, :].astype(heads.dtype)


def _attend(
    q: Float[Array, "B K G D"],
    parts: tuple[tuple[Float[Array, "B K _ D"], Float[Array, "B K _ D"], Bool[Array, "B #K _"]], ...],
    scale: float,
) -> Float[Array, "B K G D"]:
    """float32, over keys, finite values and masks in several parts, which need not be put side by side."""
    logits = [jnp.where(mask[:, :, None], dot("bkgd,bkad->bkga", q, keys) * scale, -jnp.inf) for keys, _, mask in parts]
    top = jnp.max(jnp.stack([x.max(-1, keepdims=True, initial=-jnp.inf) for x in logits]), axis=0)
    weights = [jnp.exp(x - jnp.where(jnp.isfinite(top), top, 0)) for x in logits]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    pairs = zip(weights, (values for _, values, _ in parts), strict=True)
    out = sum(dot("bkga,bkad->bkgd", x.astype(values.dtype), values) for x, values in pairs)
    return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
