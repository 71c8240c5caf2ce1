"""The attention layer: projections around the ops, one module for all variants."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from nosa_jax import rope
from nosa_jax.attention.dense import dense_attention
from nosa_jax.attention.importance import Importance
from nosa_jax.attention.layout import Layout
from nosa_jax.attention.selection import select
from nosa_jax.config import ModelConfig
from pallas_kernels import blocks
from pallas_kernels.block_attention import block_attention
from pallas_kernels.pooled_keys import pool_keys

SELECTION = "block_ids"  # name of the selection for `jax.checkpoint` policies


class Projections(NamedTuple):
    """q [B, T, N, D] and k [B, K, T, D] after RoPE, v [B, K, T, D]; importance [B, K, T] float32, None where unused."""

    q: Float[Array, "B T N D"]
    k: Float[Array, "B K T D"]
    v: Float[Array, "B K T D"]
    importance: Float[Array, "B K T"] | None


class Attention(nnx.Module):
    """Parameters of all layers, stacked; the methods work on the slice of one layer that a scan hands them.

    qkv [L, H, (N + 2K) D]: all query heads, then keys, then values. output [L, N D, H].
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        layers, hidden, dim = config.num_layers, config.hidden_size, config.head_dim
        width = (config.num_heads + 2 * config.num_kv_heads) * dim
        self.qkv = nnx.Param(0.02 * jax.random.normal(rngs.params(), (layers, hidden, width), dtype))
        scale = 0.02 / (2 * layers) ** 0.5
        self.output = nnx.Param(
            scale * jax.random.normal(rngs.params(), (layers, config.num_heads * dim, hidden), dtype)
        )
        self.importance = (
            Importance(layers, config.num_kv_heads, dim, rngs=rngs) if config.attention.uses_importance else None
        )

    def heads(self, config: ModelConfig, x: Float[Array, "*rows H"]) -> Float[Array, "*rows heads D"]:
        """Queries, keys and values before RoPE, all heads of all three."""
        return (x @ self.qkv[...]).reshape(*x.shape[:-1], -1, config.head_dim)

    def project(
        self,
        config: ModelConfig,
        x: Float[Array, "B T H"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
    ) -> Projections:
        """cos, sin: of the tokens' positions, see `rope.cos_sin`."""
        heads, kv_heads = config.num_heads, config.num_kv_heads
        q, k, v = jnp.split(self.heads(config, x), (heads, heads + kv_heads), axis=2)
        importance = None
        if config.attention.uses_importance:
            assert self.importance is not None
            importance = self.importance(v)
        k = rope.rotate(k, cos, sin)
        return Projections(rope.rotate(q, cos, sin), jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), importance)

    def merge(self, out: Float[Array, "B T N D"]) -> Float[Array, "B T H"]:
        return out.reshape(*out.shape[:2], -1) @ self.output[...]

    def __call__(
        self,
        config: ModelConfig,
        x: Float[Array, "B T H"],
        layout: Layout,
        block_ids: Int32[Array, "B K T J"] | None = None,
    ) -> tuple[Float[Array, "B T H"], Int32[Array, "B K T J"] | None]:
        """Whole rows at once. Given `block_ids` replace the selection. Returns (output, ids used; None for `full`)."""
        attention = config.attention
        q, k, v, importance = self.project(config, x, *rope.of_positions(config, layout.rope_positions))
        if not attention.is_sparse:
            return self.merge(dense_attention(q, k, v, layout, attention.block_size)), None
        if block_ids is None:
            stride = attention.pooling_stride
            pooled_importance = None
            if importance is not None:
                pooled_importance = pool_keys(jax.lax.stop_gradient(importance)[..., None], stride=stride)[..., 0]
            block_ids = select(
                attention,
                q,
                pool_keys(jax.lax.stop_gradient(k), stride=stride) if attention.uses_query_scores else None,
                pooled_importance,
                layout.positions,
                layout.first_block,
                num_blocks=blocks.num_blocks(x.shape[1], attention.block_size),
            )
        block_ids = checkpoint_name(block_ids, SELECTION)
        out, _ = block_attention(
            q, k, v, importance, block_ids, layout.positions, layout.first_block, block_size=attention.block_size
        )
        return self.merge(out), block_ids
