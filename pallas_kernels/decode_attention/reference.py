"""Decode attention as the definition reads: gather the named blocks, one masked softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.decode_attention.arguments import Residence, Store, Token
from pallas_kernels.fetch_blocks.reference import fetch_blocks_ref


def decode_attention_ref(
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


def update_and_attend_ref(
    token: Token,
    store: Store,
    residence: Residence,
    positions: np.ndarray,
    layer: int,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B N D"], np.ndarray]:
    """The three parts one after the other, over numpy arrays."""
    block_ids, slots, loads = residence
    pool = np.array(store.pool)
    if store.host is not None:
        assert loads is not None and store.page_table is not None
        host, pages, missing, into = (np.asarray(x) for x in (store.host, store.page_table, loads, slots))
        pool = fetch_blocks_ref(pool, host, pages, missing, into, layer)
    for b, head, j in np.ndindex(*block_ids.shape):
        block, place = divmod(int(positions[b]), store.block_size)
        if positions[b] >= 0 and block_ids[b, head, j] == block and 0 <= slots[b, head, j] < store.num_slots:
            pool[layer, b, head, slots[b, head, j], :, place] = token.k[b, head], token.v[b, head]
    arguments = (token.q, pool, store.bias, slots, block_ids, positions)
    q, kv, bias, slots, block_ids, at = jax.tree.map(jnp.asarray, arguments)
    return decode_attention_ref(q, kv, bias, slots, block_ids, at, layer, scale=scale), pool
