"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers, as_scale
from pallas_kernels._dispatch import register
from pallas_kernels.block_attention import cudnn, mosaic, triton, vjp, xla
from pallas_kernels.blocks import MAX_SIZE
from pallas_kernels.checks import (
    bad_value,
    require_ascending,
    require_given,
    require_shape,
    require_size,
)
from pallas_kernels.derivatives import reverse_mode_only

BLOCK_ATTENTION = register(
    "block_attention",
    {
        "cudnn": cudnn.attend,
        "xla": vjp.differentiable(xla.forward, xla.backward),
        "triton": vjp.differentiable(triton.forward, triton.backward),
        "mosaic": vjp.differentiable(mosaic.forward, triton.backward),
    },
    {"cudnn": cudnn.unsupported, "triton": triton.unsupported, "mosaic": mosaic.unsupported},
)


def block_attention(
    q: Float[ArrayLike, "B T N D"],
    k: Float[ArrayLike, "B K S D"],
    v: Float[ArrayLike, "B K S D"],
    bias: Float[ArrayLike, "B K S"] | None,
    block_ids: Integer[ArrayLike, "B K T J"] | None,
    positions: Integer[ArrayLike, "B T"] | None,
    first_block: Integer[ArrayLike, "B M"] | None = None,
    *,
    block_size: int,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """softmax(q . k * scale + bias) v over the tokens of the selected blocks, up to the query (paper equation 5).

    q: queries; head n belongs to KV head n // (N/K).
    k, v: keys and values of every token of the rows.
    bias: added after scaling; None for no bias.
    block_ids: in any order, without repeats, ids outside [0, M) ignored; None selects every block.
    positions: of the queries among the keys, strictly ascending (packed rows too: they do not restart), with -1 for
        padding anywhere (output 0, lse -inf); under jit neither this nor repeats can be checked, and gradients would be
        wrong. None: query t is token t of its row, T = S; without ids and bias cuDNN takes that.
    first_block: for each of the M blocks the first block of its document; None for one document per row.
    block_size: P, tokens per block, at most 65536.
    scale: of the logits, a Python number; 1/sqrt(D) by default.

    Returns (out in q's dtype, natural-log lse in float32), differentiable in q, k, v and bias, also through lse: once,
    in reverse mode; `jax.jvp` of `jax.grad` works where "xla" runs.
    Raises ValueError or TypeError for arguments that do not go together.
    """
    require_given(q=q, k=k, v=v)
    q, k, v, bias = as_floats(q=q, k=k, v=v, bias=bias)
    block_ids, positions, first_block = as_integers(block_ids=block_ids, positions=positions, first_block=first_block)
    block_size = require_size("block_size", block_size, 1, maximum=MAX_SIZE)
    require_shape("q", q, (None,) * 4, "[B, T, N, D]")
    require_shape("k", k, (None,) * 4, "[B, K, S, D]")
    batch, length, heads, dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    scale = as_scale(scale, dim)
    require_shape("k", k, (batch, None, None, dim), "[B, K, S, D]")
    require_shape("v", v, k.shape, "[B, K, S, D]")
    if positions is not None:
        require_shape("positions", positions, (batch, length), "[B, T]")
        require_ascending("positions", positions)
    elif length != tokens:
        raise bad_value(
            "positions",
            "must be given unless the queries are all tokens of their rows",
            f"None with T={length}, S={tokens}",
            "Pass the positions of the queries among the keys.",
        )
    if heads % kv_heads:
        raise bad_value("q", "must have a multiple of K heads", f"N={heads}, K={kv_heads}", "Check the head axis.")
    if first_block is not None:
        require_shape("first_block", first_block, (batch, -(-tokens // block_size)), "[B, M]")
    if bias is not None:
        require_shape("bias", bias, (batch, kv_heads, tokens), "[B, K, S]")
    if block_ids is not None:
        require_shape("block_ids", block_ids, (batch, kv_heads, length, None), "[B, K, T, J]")
    if q.size == 0 or tokens == 0:
        return jnp.zeros_like(q), jnp.full(q.shape[:-1], -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
    settings = xla.Settings(block_size, scale)
    with jax.named_scope("block_attention"), reverse_mode_only("block_attention"):
        return BLOCK_ATTENTION(implementation, settings, q, k, v, bias, block_ids, positions, first_block)
