"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers, as_layer, as_scale
from pallas_kernels._dispatch import register
from pallas_kernels.checks import bad_value, require_given, require_shape, require_type
from pallas_kernels.rebuilt_attention import triton, xla
from pallas_kernels.rebuilt_attention.arguments import Chunks, Exact, Factors

REBUILT_ATTENTION = register(
    "rebuilt_attention",
    {"xla": xla.rebuilt_attention, "triton": triton.rebuilt_attention},
    {"triton": triton.unsupported},
)


def rebuilt_attention(
    q: Float[ArrayLike, "B N D"],
    factors: Factors,
    chunks: Chunks,
    exact: Exact,
    layer: Integer[ArrayLike, ""],
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N D"]:
    """Attention of one query token per row over exact tokens and chunks whose keys are rebuilt from factors.

    q: the queries after RoPE, one token per row.
    factors: of the keys of all chunks. chunks: which are attended, and where their values lie. exact: other tokens.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    scale: of the logits, 1/sqrt(D) by default.

    Returns the dtype of q; accumulates in float32; 0 for rows that attend to nothing. Has no gradients. Raises
    ValueError or TypeError for arguments that do not go together.
    """
    for name, value, kind in (("factors", factors, Factors), ("chunks", chunks, Chunks), ("exact", exact, Exact)):
        require_type(name, value, kind, f"Pass pallas_kernels.{kind.__name__}(...).")
    given = {f"factors.{name}": x for name, x in factors._asdict().items()}
    given |= {"chunks.pool": chunks.pool, "exact.tokens": exact.tokens}
    listed = {"chunks.ids": chunks.ids, "chunks.slots": chunks.slots, "exact.lengths": exact.lengths}
    require_given(q=q, **given, **listed, layer=layer)
    q, *factored, pool, tokens = as_floats(q=q, **given)
    ids, slots, lengths = as_integers(**listed)
    factors, chunks, exact = Factors(*factored), Chunks(pool, ids, slots), Exact(tokens, lengths)
    _check(q, factors, chunks, exact)
    layer, scale = as_layer(layer, pool.shape[0]), as_scale(scale, q.shape[-1])
    with jax.named_scope("rebuilt_attention"):
        return REBUILT_ATTENTION(implementation, q, factors, chunks, exact, layer, scale=scale)


def _check(q: Array, factors: Factors, chunks: Chunks, exact: Exact) -> None:
    require_shape("q", q, (None,) * 3, "[B, N, D]")
    require_shape("chunks.pool", chunks.pool, (None,) * 7, "[L, B, K, slots, 1, c, D]")
    batch, heads, dim = q.shape
    layers, _, kv_heads, _, _, size, _ = chunks.pool.shape
    cells = (layers, batch, kv_heads)
    require_shape("chunks.pool", chunks.pool, (*cells, None, 1, size, dim), "[L, B, K, slots, 1, c, D]")
    require_shape("chunks.ids", chunks.ids, (batch, kv_heads, None), "[B, K, s]")
    require_shape("chunks.slots", chunks.slots, chunks.ids.shape, "[B, K, s]")
    require_shape("factors.tokens", factors.tokens, (layers, batch, None, size, None), "[L, B, U, c, r]")
    require_shape("factors.heads", factors.heads, (*cells, factors.tokens.shape[-1], dim), "[L, B, K, r, D]")
    require_shape("factors.cos", factors.cos, (None, dim // 2), "[S, D / 2]")
    require_shape("factors.sin", factors.sin, factors.cos.shape, "[S, D / 2]")
    require_shape("exact.tokens", exact.tokens, (*cells, 2, None, dim), "[L, B, K, 2, E, D]")
    require_shape("exact.lengths", exact.lengths, (batch,), "[B]")
    if dim % 2:
        raise bad_value("q", "must have an even head dim, which is rotated in halves", dim, "Pad it.")
    if heads % kv_heads:
        raise bad_value("q", "must have a multiple of K heads", f"N={heads}, K={kv_heads}", "Check the head axis.")
