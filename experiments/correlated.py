"""Inputs whose neighbouring tokens are alike, and the real selection over them: what the kernels are timed on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.attention.selection import select
from nosa_jax.config import AttentionConfig
from pallas_kernels.pooled_keys import pool_keys

QUERY_CORRELATION = 0.977  # between neighbours; gives gamma = 0.945 at 32 query and 2 KV heads


class Inputs(NamedTuple):
    """One row of T tokens. bias is the importance."""

    q: Float[Array, "1 T N D"]
    k: Float[Array, "1 K T D"]
    v: Float[Array, "1 K T D"]
    bias: Float[Array, "1 K T"]
    positions: Int32[Array, "1 T"]


def _autoregressive(key: Array, shape: tuple[int, ...], correlation: float) -> Array:
    """Standard normal numbers, bfloat16, correlated along the first axis."""
    noise = jax.random.normal(key, shape, jnp.float32)

    def step(state: Array, new: Array) -> tuple[Array, Array]:
        state = correlation * state + (1 - correlation**2) ** 0.5 * new
        return state, state.astype(jnp.bfloat16)

    return jax.lax.scan(step, noise[0], noise)[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_inputs(tokens: int, heads: int = 32, kv_heads: int = 2, dim: int = 128, seed: int = 0) -> Inputs:
    keys = jax.random.split(jax.random.key(seed), 4)
    q = _autoregressive(keys[0], (tokens, heads, dim), QUERY_CORRELATION)
    k = _autoregressive(keys[1], (tokens, kv_heads, dim), 0.9)
    v = _autoregressive(keys[2], (tokens, kv_heads, dim), 0.5)
    bias = jax.nn.softplus(_autoregressive(keys[3], (tokens, kv_heads), 0.95).astype(jnp.float32))
    positions = jnp.arange(tokens, dtype=jnp.int32)
    return Inputs(q[None], *(jnp.moveaxis(x, 0, 1)[None] for x in (k, v, bias)), positions[None])


def selection(config: AttentionConfig, inputs: Inputs) -> Int32[Array, "1 K T J"]:
    """Pooling, scores and selection, as the attention layer does them."""
    stride = config.pooling_stride
    return select(
        config,
        inputs.q,
        pool_keys(jax.lax.stop_gradient(inputs.k), stride=stride),
        pool_keys(jax.lax.stop_gradient(inputs.bias)[..., None], stride=stride)[..., 0],
        inputs.positions,
        num_blocks=-(-inputs.q.shape[1] // config.block_size),
    )


@functools.partial(jax.jit, static_argnames="num_blocks")
def locality(block_ids: Int32[Array, "1 K T J"], *, num_blocks: int) -> dict[str, Any]:
    """gamma and the mean union of 4 and 8 adjacent queries over the last 8192 tokens."""
    ids = block_ids[:, :, -8192:]
    member = jnp.zeros((*ids.shape[:3], num_blocks + 1), jnp.int8)
    member = jnp.put_along_axis(member, jnp.where(ids < 0, num_blocks, ids), 1, -1, inplace=False)[..., :num_blocks]
    kept = (member[:, :, 1:] & member[:, :, :-1]).sum(-1, dtype=jnp.int32)
    result = {"gamma": (kept / member[:, :, 1:].sum(-1, dtype=jnp.int32)).mean()}
    for tile in (4, 8):
        unions = member.reshape(*member.shape[:2], -1, tile, num_blocks).max(3).sum(-1, dtype=jnp.int32)
        result[f"union_{tile}"] = unions.mean()
    return result
