"""Dense causal attention for the `full` variant."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax import parallel
from nosa_jax.attention.layout import Layout
from pallas_kernels import block_attention


def dense_attention(
    q: Float[Array, "B T N D"], k: Float[Array, "B K T D"], v: Float[Array, "B K T D"], layout: Layout, block_size: int
) -> Float[Array, "B T N D"]:
    """Attention of whole rows to every earlier token of their document; 0 at padded positions."""
    # cuDNN takes rows without positions. Where a row is one document, its padding comes last and no token sees it.
    cut = parallel.context_size(q.shape[1]) > 1
    positions = layout.positions if cut or layout.first_block is not None else None

    def attend(q: Array, k: Array, v: Array, positions: Array | None, first_block: Array | None) -> Array:
        k, v = map(parallel.all_tokens, (k, v))
        return block_attention(q, k, v, None, None, positions, first_block, block_size=block_size)[0]

    out = parallel.per_row_and_head(
        attend, (q, k, v, positions, layout.first_block), ("btk.", "bkt.", "bkt.", "bt", "b."), "btk."
    )
    return jnp.where((layout.positions >= 0)[..., None, None], out, 0)


def dense_attention_in_cache(
    q: Float[Array, "B n N D"],
    new: tuple[Float[Array, "B K n D"], Float[Array, "B K n D"]],
    cached: tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]],
    positions: Int32[Array, "B n"],
    block_size: int,
    *,
    fresh: bool,
) -> Float[Array, "B n N D"]:
    """Attention of new tokens to every earlier one of their rows; 0 at padded positions.

    new: their keys and values. cached: those of the whole cache, these among them. positions: -1 for padding. fresh:
    the rows were empty before, so that the new tokens are all there is; their padding comes last.
    """
    if not fresh:
        return block_attention(q, *cached, None, None, positions, block_size=block_size)[0]
    # Whole rows without positions are what cuDNN takes. No token sees the padding behind it.
    out = block_attention(q, *new, None, None, None, block_size=block_size)[0]
    return jnp.where((positions >= 0)[..., None, None], out, 0)
