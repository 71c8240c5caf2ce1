"""One program per row and KV head rotates its queries and key and adds the token to the running summaries, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend
from pallas_kernels.append_token.summaries import Summaries


def rotated(qkv, cos, sin, row, head, member):
    """A member of a group after rotation, [D], or [n, D] of n members, in the dtype of `qkv`.

    As two halves side by side, so that loads of each and of its opposite are whole runs.
    """
    dim = qkv.shape[3]
    half = jnp.arange(2, dtype=jnp.int32)[:, None]
    lane = jnp.arange(dim // 2, dtype=jnp.int32)[None]
    many = getattr(member, "ndim", 0) > 0
    at = member[:, None, None] if many else member
    lift = (lambda x: x[None]) if many else (lambda x: x)
    mine, opposite = (
        qkv[row, head, at, lift(side * (dim // 2) + lane)].astype(jnp.float32) for side in (half, 1 - half)
    )
    cosine, sine = (lift(table[row, lane]) for table in (cos, sin))
    turned = mine * cosine + jnp.where(lift(half) == 0, -opposite, opposite) * sine
    return turned.astype(qkv.dtype).reshape(*member.shape, dim) if many else turned.astype(qkv.dtype).reshape(dim)


def group_members(group, rows):
    """Which query head of a group each of `rows` lanes has: those beyond the group repeat its first."""
    lane = jnp.arange(rows, dtype=jnp.int32)
    return jnp.where(lane < group, lane, 0)


def load_sums(cache, at, part):
    """Of the half window before, and of this one. at: layer, row and head. part: which dims."""
    return tuple(cache[1][(*at, half, part)] for half in range(2))


class Opened(NamedTuple):
    """What a running mean of half windows becomes with one number (or key) more, as `append_pooled_keys` does it.

    window: the one that is complete now, -1 where none is. mean: its. sums: of the half window before, and of this one.
    """

    window: Any
    mean: Any
    sums: tuple[Any, Any]

    @classmethod
    def of(cls, cache, sums, new, position, stride):
        """sums: what `load_sums` gave, early enough that nobody waits for it."""
        before, opened = sums[0], sums[1] + new
        complete = ((position + 1) % stride == 0) & (position >= 0)
        window = position // stride - 1
        window = jnp.where(complete & (window >= 0) & (window < cache[0].shape[3]), window, -1)
        after = jnp.where(complete, opened, before), jnp.where(complete, 0.0, opened)
        return cls(window, ((before + opened) / (2 * stride)).astype(cache[0].dtype), after)

    def store(self, cache, at, part):
        """All threads of the program must have made theirs before."""
        pooled, sums = cache

        @_backend.when(self.window >= 0)
        def _():
            pooled[(*at, jnp.maximum(self.window, 0), part)] = self.mean

        for half in range(2):
            sums[(*at, half, part)] = self.sums[half]


def append_importance(at, position, qkv, scale, delta, new, *, stride):
    """In a kernel: the importance of the token of a row and KV head, into the summaries `new`. at: layer, row, head."""
    layer, row, head = at
    kv_heads, members, dim = qkv.shape[1:]
    sums, factor = load_sums(new.pooled_importance, at, 0), scale[layer, head]
    other = jnp.arange(_backend.next_power_of_two(kv_heads), dtype=jnp.int32)[:, None]
    real, other = other < kv_heads, jnp.minimum(other, kv_heads - 1)
    lanes = jnp.arange(dim, dtype=jnp.int32)[None]
    weights, values = delta[layer, other, lanes, head], qkv[row, other, members - 1, lanes].astype(jnp.float32)
    change = jnp.sum(jnp.where(real, values * weights, 0.0))
    importance = factor * (jnp.maximum(change, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(change))))
    opened = Opened.of(new.pooled_importance, sums, importance, position, stride)
    _backend.barrier()
    size = new.importance.shape[4]

    @_backend.when(position // size < new.importance.shape[3])
    def _():
        new.importance[(*at, position // size, position % size)] = importance

    opened.store(new.pooled_importance, at, 0)


def store_token(row, head, qkv, cos, sin, q, k, v):
    """In a kernel: the queries and the key of a row and KV head, rotated, and the value."""
    group = qkv.shape[2] - 2
    member = group_members(group, _backend.next_power_of_two(group))
    q[row, head * group + member] = rotated(qkv, cos, sin, row, head, member)
    k[row, head] = rotated(qkv, cos, sin, row, head, group)
    v[row, head] = qkv[row, head, group + 1]


def _kernel(layer, positions, qkv, cos, sin, scale, delta, _old, q, k, v, new, *, stride):
    """_old: summaries, whose memory `new` is."""
    head, row = (_backend.program_id(axis) for axis in range(2))
    kept, position = jax.tree.leaves(new), positions[row]
    at = (_backend.layer_index(layer, kept[0]) if kept else 0, row, head)
    store_token(row, head, qkv, cos, sin, q, k, v)

    @_backend.when(position >= 0)
    def _():
        if new.pooled_keys is not None:
            sums = load_sums(new.pooled_keys, at, slice(None))
            key = rotated(qkv, cos, sin, row, head, qkv.shape[2] - 2).astype(jnp.float32)
            opened = Opened.of(new.pooled_keys, sums, key, position, stride)
            _backend.barrier()
            opened.store(new.pooled_keys, at, slice(None))
        if new.importance is not None:
            append_importance(at, position, qkv, scale, delta, new, stride=stride)


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
        num_warps=1,
        aliases={given + i: 3 + i for i in range(kept)},
    )(*operands, summaries)
