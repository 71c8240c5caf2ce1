"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers
from pallas_kernels._dispatch import register
from pallas_kernels.block_scores import triton, xla
from pallas_kernels.checks import bad_value, require_given, require_shape, require_size

BLOCK_SCORES = register(
    "block_scores", {"xla": xla.block_scores, "triton": triton.block_scores}, {"triton": triton.unsupported}
)


def block_scores(
    q: Float[ArrayLike, "B T N D"],
    pooled_keys: Float[ArrayLike, "B K C D"],
    positions: Integer[ArrayLike, "B T"],
    first_block: Integer[ArrayLike, "B M"] | None = None,
    *,
    num_blocks: int,
    block_size: int,
    stride: int,
    implementation: str = "auto",
) -> Float[Array, "B K T M"]:
    """How much each query wants each block (paper section 3.2, query-aware selection).

    q: queries after RoPE.
    pooled_keys: from `pool_keys`.
    positions: in the whole row, also when it packs documents; -1 for padding, whose scores are 0.
    first_block: for each of the M blocks the first block of its document; None for one document per row.
    num_blocks: M, enough for every window.
    block_size: P, tokens per block.
    stride: of the pooling windows, in tokens; it divides block_size.

    Returns float32; blocks without any window score -inf. Scores of a query that holds NaN or inf, or sees them in a
    window, mean nothing, NaN among them; `select_blocks` keeps its forced blocks. Not differentiable.
    Raises ValueError or TypeError for arguments that do not go together.
    """
    require_given(q=q, pooled_keys=pooled_keys, positions=positions)
    q, pooled_keys = as_floats(q=q, pooled_keys=pooled_keys)
    positions, first_block = as_integers(positions=positions, first_block=first_block)
    num_blocks = require_size("num_blocks", num_blocks, 0)
    block_size, stride = require_size("block_size", block_size, 1), require_size("stride", stride, 1)
    if num_blocks * block_size >= 2**31:
        rule = f"must be below 2**31 / block_size = {2**31 // block_size}, as positions are int32"
        raise bad_value("num_blocks", rule, num_blocks, "Pass the blocks of the longest row.")
    require_shape("q", q, (None,) * 4, "[B, T, N, D]")
    batch, length, heads, dim = q.shape
    require_shape("pooled_keys", pooled_keys, (batch, None, None, dim), "[B, K, C, D]")
    kv_heads, windows = pooled_keys.shape[1:3]
    require_shape("positions", positions, (batch, length), "[B, T]")
    if first_block is not None:
        require_shape("first_block", first_block, (batch, num_blocks), "[B, M]")
    if block_size % stride or block_size < stride:
        raise bad_value("block_size", f"must be a multiple of stride = {stride}", block_size, "Change one of them.")
    if heads % kv_heads:
        raise bad_value("q", "must have a multiple of K heads", f"N={heads}, K={kv_heads}", "Check the head axis.")
    if windows > num_blocks * (block_size // stride):
        raise bad_value("num_blocks", "must cover every window", f"{num_blocks} for C={windows}", "Raise it.")
    with jax.named_scope("block_scores"):
        return BLOCK_SCORES(
            implementation, jax.lax.stop_gradient(q), jax.lax.stop_gradient(pooled_keys), positions, first_block,
            num_blocks=num_blocks, block_size=block_size, stride=stride,
        )  # fmt: skip
