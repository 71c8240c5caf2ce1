"""Decode attention as the definition reads: gather the named blocks, one masked softmax in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def decode_attention(
    q: Float[Array, "B N D"],
    pool: Float[Array, "L B K slots 2 P D"],
    bias: Float[Array, "L B K M P"] | None,
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: int | Int32[Array, ""],
    *,
    scale: float | None = None,
) -> Float[Array, "B N D"]:
    batch, heads, dim = q.shape
    kv_heads, num_slots, size = pool.shape[2], pool.shape[3], pool.shape[5]
    scale = dim**-0.5 if scale is None else scale
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    valid = (block_ids >= 0) & (block_ids <= positions[:, None, None] // size) & (slots >= 0) & (slots < num_slots)
    token = block_ids[..., None] * size + jnp.arange(size)
    mask = valid[..., None] & (token <= positions[:, None, None, None])  # [B, K, J, P]
    kv = pool[layer, row, head, jnp.where(valid, slots, 0)].astype(jnp.float32)  # [B, K, J, 2, P, D]
    kv = jnp.where(mask[:, :, :, None, :, None], kv, 0)
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("bkgd,bkjpd->bkgjp", grouped, kv[:, :, :, 0]) * scale
    if bias is not None:
        logits += bias[layer, row, head, jnp.where(valid, block_ids, 0)][:, :, None]
    logits = jnp.where(mask[:, :, None], logits, -jnp.inf).reshape(*grouped.shape[:3], -1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).reshape(*grouped.shape[:3], *mask.shape[2:])
    out = jnp.einsum("bkgjp,bkjpd->bkgd", weights, kv[:, :, :, 1])
    return out.reshape(batch, heads, dim).astype(q.dtype)
