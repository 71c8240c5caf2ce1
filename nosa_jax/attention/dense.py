"""Dense causal attention for the `full` variant."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from nosa_jax.attention.layout import Layout
from pallas_kernels import block_attention


def dense_attention(
    q: Float[Array, "B T N D"], k: Float[Array, "B K T D"], v: Float[Array, "B K T D"], layout: Layout, block_size: int
) -> Float[Array, "B T N D"]:
    """Attention of whole rows to every earlier token of their document; 0 at padded positions."""
    # cuDNN takes rows without positions. Where a row is one document, its padding comes last and no token sees it.
    positions = None if layout.first_block is None else layout.positions
    out, _ = block_attention(q, k, v, None, None, positions, layout.first_block, block_size=block_size)
    return jnp.where((layout.positions >= 0)[..., None, None], out, 0)
