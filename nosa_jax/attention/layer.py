"""The attention layer: projections around the ops, one module for all variants."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from nosa_jax import parallel, rope
from nosa_jax.attention.dense import dense_attention
from nosa_jax.attention.importance import Importance
from nosa_jax.attention.layout import Layout
from nosa_jax.attention.selection import select_in_rows
from nosa_jax.config import ModelConfig
from pallas_kernels import block_attention
from pallas_kernels.formulas import rms_norm

SELECTION = "block_ids"  # name of the selection for `jax.checkpoint` policies


class Projections(NamedTuple):
    """q [B, T, N, D] and k [B, K, T, D] after RoPE, v [B, K, T, D]; importance [B, K, T] float32, None where unused."""

    q: Float[Array, "B T N D"]
    k: Float[Array, "B K T D"]
    v: Float[Array, "B K T D"]
    importance: Float[Array, "B K T"] | None


class Recorded(NamedTuple):
    """What a layer has to tell of how it selected: block_ids [B, K, T, J] int32; importance [B, K, T] float32, None
    where unused."""

    block_ids: Int32[Array, "B K T J"]
    importance: Float[Array, "B K T"] | None


def by_kv_head(
    q: Float[Array, "*rest N D"], k: Float[Array, "*rest K D"], v: Float[Array, "*rest K D"]
) -> Float[Array, "*rest K G_plus_2 D"]:
    """Puts the query heads of each KV head, its key and its value side by side, as the fused projection has them."""
    grouped = q.reshape(*k.shape[:-1], -1, q.shape[-1])
    return jnp.concatenate([grouped, k[..., None, :], v[..., None, :]], axis=-2)


class Attention(nnx.Module):
    """Parameters of all layers, stacked; the methods work on the slice of one layer that a scan hands them.

    qkv [L, H, K, G + 2, D]: of each KV head its query heads, its key and its value, so that a cut along K moves no
    data. output [L, N D, H]. Where the configuration asks for them, else None: qkv_bias [L, K, G + 2, D], output_bias
    [L, H], and query_norm and key_norm [L, D], the weights of RMS norms of each head before RoPE.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        layers, hidden, dim = config.num_layers, config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        # Drawn head by head, so that a seed means the same model however the heads are arranged.
        shape = (layers, hidden, heads + 2 * kv_heads, dim)
        drawn = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
        self.qkv = nnx.Param(by_kv_head(*jnp.split(drawn, (heads, heads + kv_heads), axis=2)))
        self.qkv_bias = nnx.Param(jnp.zeros((layers, *self.qkv.shape[2:]), dtype)) if config.qkv_bias else None
        self.query_norm = nnx.Param(jnp.ones((layers, dim), dtype)) if config.qk_norm else None
        self.key_norm = nnx.Param(jnp.ones((layers, dim), dtype)) if config.qk_norm else None
        scale = 0.02 / (2 * layers) ** 0.5
        self.output = nnx.Param(scale * jax.random.normal(rngs.params(), (layers, heads * dim, hidden), dtype))
        self.output_bias = nnx.Param(jnp.zeros((layers, hidden), dtype)) if config.output_bias else None
        self.importance = Importance(layers, kv_heads, dim, rngs=rngs) if config.attention.uses_importance else None

    def heads(self, config: ModelConfig, x: Float[Array, "*rows H"]) -> Float[Array, "*rows K G_plus_2 D"]:
        """The query heads, the key and the value of each KV head, before RoPE."""
        weight = self.qkv[...]
        qkv = (x @ weight.reshape(weight.shape[0], -1)).reshape(*x.shape[:-1], *weight.shape[1:])
        if self.qkv_bias is not None:
            qkv += self.qkv_bias[...]
        if self.query_norm is not None and self.key_norm is not None:
            q, k, v = jnp.split(qkv, (config.group_size, config.group_size + 1), axis=-2)
            q = rms_norm(q, self.query_norm[...], config.rms_norm_eps)
            k = rms_norm(k, self.key_norm[...], config.rms_norm_eps)
            qkv = jnp.concatenate([q, k, v], axis=-2)
        return qkv

    def project(
        self,
        config: ModelConfig,
        x: Float[Array, "B T H"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
    ) -> Projections:
        """cos, sin: of the tokens' positions, see `rope.cos_sin`."""
        qkv = self.heads(config, x)
        q = qkv[..., :-2, :].reshape(*x.shape[:2], config.num_heads, config.head_dim)
        k, v = qkv[..., -2, :], qkv[..., -1, :]
        importance = None
        if config.attention.uses_importance:
            assert self.importance is not None
            importance = self.importance(v)
        k = rope.rotate(k, cos, sin)
        return Projections(rope.rotate(q, cos, sin), jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), importance)

    def merge(self, out: Float[Array, "B T N D"]) -> Float[Array, "B T H"]:
        """The output projection of all heads."""
        merged = out.reshape(*out.shape[:2], -1) @ self.output[...]
        return merged if self.output_bias is None else merged + self.output_bias[...]

    def __call__(
        self,
        config: ModelConfig,
        x: Float[Array, "B T H"],
        layout: Layout,
        forced_block_ids: Int32[Array, "B K T J"] | None = None,
    ) -> tuple[Float[Array, "B T H"], Recorded | None]:
        """Attention of whole rows at once.

        forced_block_ids: used instead of selecting. Returns the output and what was used, None for `full`.
        """
        attention = config.attention
        q, k, v, importance = self.project(config, x, *rope.of_positions(config, layout.rope_positions))
        if not attention.is_sparse:
            return self.merge(dense_attention(q, k, v, layout, attention.block_size)), None
        block_ids = forced_block_ids
        if block_ids is None:
            block_ids = select_in_rows(attention, q, k, importance, layout)
        block_ids = checkpoint_name(block_ids, SELECTION)

        def attend(q: Any, k: Any, v: Any, bias: Any, block_ids: Any, positions: Any, first_block: Any) -> Array:
            k, v, bias = map(parallel.all_tokens, (k, v, bias))
            size = attention.block_size
            return block_attention(q, k, v, bias, block_ids, positions, first_block, block_size=size)[0]

        out = parallel.per_row_and_head(
            attend,
            (q, k, v, importance, block_ids, layout.positions, layout.first_block),
            ("btk.", "bkt.", "bkt.", "bkt", "bkt.", "bt", "b."),
            "btk.",
        )
        return self.merge(out), Recorded(block_ids, importance)
