"""Decode attention in chunks of blocks, ascending, through the slot table.

What is computed depends on J only, never on how many slots there are: a pool with any number of slots gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks
from pallas_kernels.decode_attention.arguments import Residence, Store, Token
from pallas_kernels.fetch_blocks.xla import fetch_blocks
from pallas_kernels.formulas import weight_shift
from pallas_kernels.varying import axes_of, varying

_CHUNK = 4  # blocks gathered at once


def decode_attention(
    q: Float[Array, "B N D"],
    pool: Float[Array, "L B K slots 2 P D"],
    bias: Float[Array, "L B K M P"] | None,
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
) -> Float[Array, "B N D"]:
    batch, heads, dim = q.shape
    kv_heads, num_slots, size = pool.shape[2], pool.shape[3], pool.shape[5]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    # Blocks after the query are dropped by id: the token numbers of a very large id would overflow.
    valid = (block_ids >= 0) & (block_ids <= positions[:, None, None] // size) & (slots >= 0) & (slots < num_slots)
    if bias is not None:
        valid &= block_ids < bias.shape[3]

    less = 0.5 ** weight_shift(
        block_ids.shape[-1] * size, pool.dtype
    )  # a power of two: it changes no bit of the output
    chunks = -(-block_ids.shape[-1] // _CHUNK)
    pad = ((0, 0), (0, 0), (0, chunks * _CHUNK - block_ids.shape[-1]))
    block_ids = jnp.pad(jnp.where(valid, block_ids, 0), pad)
    slots = jnp.pad(jnp.where(valid, slots, 0), pad)
    valid = jnp.pad(valid, pad)
    # Ids ascend, so the chunks after the longest selection of the batch are empty.
    trips = (jnp.max(jnp.where(valid, jnp.arange(chunks * _CHUNK) + 1, 0)) + _CHUNK - 1) // _CHUNK

    def body(trip: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = carry
        ids, slot, ok = (
            jax.lax.dynamic_slice_in_dim(x, trip * _CHUNK, _CHUNK, axis=-1) for x in (block_ids, slots, valid)
        )
        token = ids[..., None] * size + jnp.arange(size, dtype=jnp.int32)
        mask = (ok[..., None] & (token <= positions[:, None, None, None])).reshape(batch, kv_heads, -1)
        keys = pool[layer, row, head, slot, 0].reshape(batch, kv_heads, -1, dim)
        logits = jnp.einsum("bkgd,bksd->bkgs", grouped, keys, preferred_element_type=dtype) * scale
        if bias is not None:
            gathered = bias[layer, row, head, ids].reshape(batch, kv_heads, 1, -1)
            logits += jnp.where(mask[:, :, None], gathered, 0).astype(dtype)
        logits = jnp.where(mask[:, :, None], logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        safe_top = jnp.where(jnp.isfinite(new_top), new_top, 0)
        weights = jnp.where(mask[:, :, None], jnp.exp(logits - safe_top[..., None]) * less, 0)
        decay = jnp.exp(top - safe_top)  # 0 while nothing was seen
        values = pool[layer, row, head, slot, 1].reshape(batch, kv_heads, -1, dim)
        values = jnp.where(mask[..., None], values, 0)  # unwritten memory may hold NaN
        seen = jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values, preferred_element_type=dtype)
        return out * decay[..., None] + seen, new_top, total * decay + weights.sum(-1)

    rows = grouped.shape[:-1]
    init = (jnp.zeros(grouped.shape, dtype), jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype))
    axes = axes_of((grouped, pool, bias, slots, positions))
    out, _, total = jax.lax.fori_loop(0, trips, body, varying(init, axes))
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return out.reshape(batch, heads, dim).astype(q.dtype)


def write_token(
    pool: Float[Array, "L B K slots 2 P D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K slots 2 P D"]:
    """Writes one token per row into the slot of its block; nowhere where that is not among the ids."""
    batch, kv_heads, _ = slots.shape
    own = blocks.query_blocks(positions, pool.shape[5])
    is_own = (block_ids == own[:, None, None]) & (block_ids >= 0)
    slot = jnp.max(jnp.where(is_own, slots, -1), axis=-1)
    row, head = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :]
    target = jnp.where(slot >= 0, slot, pool.shape[3])
    token = (positions % pool.shape[5])[:, None]
    return pool.at[layer, row, head, target, :, token].set(jnp.stack([k, v], axis=2).astype(pool.dtype), mode="drop")


def update_and_attend(
    token: Token,
    store: Store,
    residence: Residence,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
    attend: Callable[..., Array] = decode_attention,
) -> tuple[Float[Array, "B N D"], Float[Array, "L B K slots 2 P D"]]:
    """attend: what runs as `decode_attention`."""
    block_ids, slots, loads = residence
    pool = store.pool
    if store.host is not None:
        assert loads is not None and store.page_table is not None
        pool = fetch_blocks(pool, store.host, store.page_table, loads, slots, layer)
    pool = write_token(pool, token.k, token.v, slots, block_ids, positions, layer)
    return attend(token.q, pool, store.bias, slots, block_ids, positions, layer, scale=scale), pool
