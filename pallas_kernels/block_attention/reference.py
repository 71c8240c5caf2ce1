"""Block-sparse attention as one dense masked softmax; differentiable by JAX, quadratic memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import blocks


def token_mask(
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    num_tokens: int,
    block_size: int,
) -> Bool[Array, "B K T S"]:
    """Which keys each query sees: not after it, inside its selected blocks and its document."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    first = blocks.query_first_blocks(positions, first_block, block_size)
    mask = ((token <= positions[..., None]) & (token >= block_size * first[..., None]))[:, None]
    if block_ids is not None:
        mask = mask & (block_ids[..., None] == token // block_size).any(-2)
    return mask


def block_attention_ref(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bias: Float[Array, "B K S"] | None,
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"] | None,
    first_block: Int32[Array, "B M"] | None = None,
    *,
    block_size: int,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """float32 maths, or float64 for float64 inputs; see the package docstring for the contract."""
    batch, length, heads, dim = q.shape
    if positions is None:
        positions = blocks.whole_rows(batch, length)
    kv_heads = k.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = dim**-0.5 if scale is None else scale
    grouped = q.astype(dtype).reshape(batch, length, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgd,bksd->bktgs", grouped, k.astype(dtype)) * scale
    if bias is not None:
        logits = logits + bias.astype(dtype)[:, :, None, None]
    mask = token_mask(block_ids, positions, first_block, num_tokens=k.shape[2], block_size=block_size)[:, :, :, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.max(jax.lax.stop_gradient(logits), axis=-1, keepdims=True)  # cancels: any other number would do
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    seen = jnp.where(mask.any((1, 2, 3))[:, None, :, None], v.astype(dtype), 0)  # 0 * NaN is NaN
    safe = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bktgs,bksd->btkgd", weights / safe, seen)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))[..., 0]
    lse = jnp.moveaxis(lse, 1, 2).reshape(batch, length, heads)
    return out.reshape(batch, length, heads, dim).astype(q.dtype), lse
