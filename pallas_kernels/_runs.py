"""Decode attention whose tokens are attended in runs, by one program each: the kernel that adds up what they found."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _backend
from pallas_kernels._backend import Softmax

Parts = tuple[jax.ShapeDtypeStruct, ...]


def parts_of(q: Array, splits: int) -> Parts:
    """What the kernel of the runs returns for q [B, K, rows, D]: weighted sums of values, highest logits, sums of
    weights, with the runs behind K."""
    batch, kv_heads, rows, dim = q.shape
    lead = (batch, kv_heads, splits, rows)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*lead, dim), lead, lead))


def _sum_kernel(sums, tops, totals, out, *, group, softmax):
    member, head, row = (_backend.program_id(axis) for axis in range(3))
    part = (row, head, slice(None), member)
    top = tops[part]
    weights = softmax.decay(top - jnp.max(top, axis=0))
    total = jnp.sum(totals[part] * weights, axis=0)
    acc = jnp.sum(sums[part] * weights[:, None], axis=0)
    out[row, head * group + member] = (acc / jnp.where(total > 0, total, 1.0)).astype(out.dtype)


def add_up(parts: tuple[Array, ...], like: Array, softmax: Softmax) -> Array:
    """The runs' outputs, a power of two of them, as one, [B, N, D] of the dtype of `like`."""
    _, kv_heads, splits, _, _ = parts[0].shape
    batch, heads, _ = like.shape
    group = heads // kv_heads

    def kernel(*refs: Any) -> None:
        _sum_kernel(*refs, group=group, softmax=softmax)

    return _backend.triton_call(
        kernel,
        name="decode_attention_sum",
        grid=(group, kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
        num_warps=4 if splits > 8 else 1,
    )(*parts)
