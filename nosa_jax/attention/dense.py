"""Dense causal attention for the `full` variant: the vendor's fused kernel where it fits, else our op."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nosa_jax.attention.layout import Layout
from pallas_kernels.block_attention import block_attention

_FUSED_DTYPES = (jnp.bfloat16, jnp.float16)


def dense_attention(
    q: Float[Array, "B T N D"], k: Float[Array, "B K T D"], v: Float[Array, "B K T D"], layout: Layout, block_size: int
) -> Float[Array, "B T N D"]:
    """Attention of whole rows to every earlier token of their document; 0 at padded positions."""
    fits = layout.first_block is None and q.dtype in _FUSED_DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    if fits and jax.default_backend() == "gpu":
        keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
        out = jax.nn.dot_product_attention(q, keys, values, is_causal=True, implementation="cudnn")
        return jnp.where((layout.positions >= 0)[..., None, None], out, 0)
    return block_attention(q, k, v, None, None, layout.positions, layout.first_block, block_size=block_size)[0]
