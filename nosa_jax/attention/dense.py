"""Dense causal attention for the `full` variant."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

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
