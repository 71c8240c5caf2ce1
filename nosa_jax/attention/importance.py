"""The query-agnostic importance of a token (paper section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.formulas import importance_of


class Importance(nnx.Module):
    """b = A * softplus(v delta), per token and KV head. Parameters are float32 in models of any dtype, stacked.

    A [L, K]; delta [L, K, D, K]: from the values of all heads to one number per head.
    A starts at zero: NOSA begins as InfLLMv2 with no bias. delta must not: with both at zero nothing would ever learn.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, *, rngs: nnx.Rngs) -> None:
        self.A = nnx.Param(jnp.zeros((layers, kv_heads), jnp.float32))
        shape = (layers, kv_heads, head_dim, kv_heads)
        self.delta = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))

    def __call__(self, v: Float[Array, "B T K D"]) -> Float[Array, "B K T"]:
        """Importance of one layer's tokens in float32; `v` is the value before any rotation."""
        return jnp.moveaxis(importance_of(v, self.A[...], self.delta[...]), -1, 1)
