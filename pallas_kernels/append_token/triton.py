"""One program per row and KV head rotates its queries and key and adds the token to the running summaries, in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend
from pallas_kernels.append_token.summaries import Summaries


def _append(cache, at, part, new, position, stride):
    """One more number (or key, `part` of its dims) for the running means of half windows, as `append_pooled_keys`."""
    pooled, sums = cache
    before, opened = sums[(*at, 0, part)], sums[(*at, 1, part)] + new
    complete = (position + 1) % stride == 0
    window = position // stride - 1

    @_backend.when(complete & (window >= 0) & (window < pooled.shape[3]))
    def _():
        pooled[(*at, jnp.maximum(window, 0), part)] = ((before + opened) / (2 * stride)).astype(pooled.dtype)

    sums[(*at, 0, part)] = jnp.where(complete, opened, before)
    sums[(*at, 1, part)] = jnp.where(complete, 0.0, opened)


def _kernel(layer, positions, qkv, cos, sin, scale, delta, old, q, k, v, new, *, stride):
    """old: summaries, whose memory `new` is."""
    head, row = (_backend.program_id(axis) for axis in range(2))
    half, (kv_heads, members, dim) = cos.shape[1], qkv.shape[1:]
    group = members - 2
    kept, position = jax.tree.leaves(new), positions[row]
    number = _backend.layer_index(layer, kept[0]) if kept else 0
    at = number, row, head
    parts = _backend.ds(0, half), _backend.ds(half, half)
    cosine, sine = cos[row], sin[row]

    def rotated(member):
        """Both halves of these members of the group."""
        first, second = (qkv[row, head, member, part].astype(jnp.float32) for part in parts)
        turned = first * cosine - second * sine, second * cosine + first * sine
        return tuple(x.astype(q.dtype) for x in turned)

    lane = jnp.arange(_backend.next_power_of_two(group), dtype=jnp.int32)
    member = jnp.where(lane < group, lane, 0)  # lanes beyond the group repeat its first head
    key = rotated(group)
    for part, query, of_key in zip(parts, rotated(member), key, strict=True):
        q[row, head * group + member, part] = query
        k[row, head, part] = of_key
    v[row, head] = qkv[row, head, group + 1]

    @_backend.when(position >= 0)
    def _():
        if new.pooled_keys is not None:
            for part, of_key in zip(parts, key, strict=True):
                _append(new.pooled_keys, at, part, of_key.astype(jnp.float32), position, stride)
        if new.importance is not None:
            other = jnp.arange(_backend.next_power_of_two(kv_heads), dtype=jnp.int32)[:, None]
            real, other = other < kv_heads, jnp.minimum(other, kv_heads - 1)
            lanes = jnp.arange(dim, dtype=jnp.int32)[None]
            values = qkv[row, other, group + 1, lanes].astype(jnp.float32)
            weights = delta[number, other, lanes, head]
            change = jnp.sum(jnp.where(real, values * weights, 0.0))
            softplus = jnp.maximum(change, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(change)))
            importance = scale[number, head] * softplus
            size = new.importance.shape[4]

            @_backend.when(position // size < new.importance.shape[3])
            def _():
                new.importance[(*at, position // size, position % size)] = importance

            _append(new.pooled_importance, at, 0, importance, position, stride)


def unsupported(
    qkv: Array, cos: Array, sin: Array, scale: Array | None, delta: Array | None, summaries: Summaries,
    positions: Array, layer: Array, *, stride: int,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take the kernel; None where they can."""
    if not _backend.is_power_of_two(qkv.shape[3]) or qkv.shape[3] < 2:
        return f"the head dim must be a power of two of at least 2, got {qkv.shape[3]}"
    if not all(x.size for x in jax.tree.leaves(summaries)):
        return "an array without elements is nothing that a kernel could write"
    return None


def append_token(
    qkv: Float[Array, "B K G_plus_2 D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    scale: Float[Array, "L K"] | None,
    delta: Float[Array, "L K D heads"] | None,
    summaries: Summaries,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    stride: int,
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"], Summaries]:
    batch, kv_heads, members, dim = qkv.shape

    def kernel(*refs: Any) -> None:
        _kernel(*refs, stride=stride)

    token = lambda count: jax.ShapeDtypeStruct((batch, count, dim), qkv.dtype)
    operands = (jax.lax.reshape(layer, (1,)), positions, qkv, cos, sin, scale, delta)
    given = sum(x is not None for x in operands)
    kept = len(jax.tree.leaves(summaries))
    return _backend.triton_call(
        kernel,
        name="append_token",
        grid=(kv_heads, batch),
        out_shape=(
            token(kv_heads * (members - 2)),
            token(kv_heads),
            token(kv_heads),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), summaries),
        ),
        num_warps=1,  # of more, one could read what another has already written
        aliases={given + i: 3 + i for i in range(kept)},
    )(*operands, summaries)
