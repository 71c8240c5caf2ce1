"""Block-sparse attention in Pallas-Triton: launches the kernels of `_forward` and `_backward` over the lists of `_lists`.

Any group size runs, padded to a power of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend, blocks
from pallas_kernels.block_attention import _lists
from pallas_kernels.block_attention._backward import key_kernel, query_kernel, sum_kernel
from pallas_kernels.block_attention._forward import forward_kernel
from pallas_kernels.block_attention.xla import Settings

_SEGMENT = 1024  # queries whose gradients one program of the key pass adds up


class Launch(NamedTuple):
    """rows: query heads that one step of the kernel multiplies at once, tokens x group."""

    rows: int
    num_warps: int
    num_stages: int


class Keys(NamedTuple):
    """k, v [B, K, M * P, D] and bias [B, K, M * P], padded to whole blocks."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    bias: Float[Array, "B K S"] | None


def _pad(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    short = -x.shape[axis] % multiple
    if short == 0:
        return x
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)], constant_values=fill)


def _tile(group: int, rows: int) -> int:
    """Queries of one tile: a power of two, at most the 32 bits that say who selected a block."""
    return max(1, min(32, rows // _backend.next_power_of_two(group)))


def _group_heads(x: Float[Array, "B T N *rest"], kv_heads: int, tile: int) -> Array:
    """[B, T, N, ...] -> [B, T', K, G', ...]: whole tiles, G padded to a power of two."""
    x = x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, *x.shape[3:])
    return _pad(_pad(x, 1, tile), 3, _backend.next_power_of_two(x.shape[3]))


def _ungroup_heads(x: Array, length: int, group: int) -> Array:
    x = x[:, :length, :, :group]
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _pad_keys(k: Array, v: Array, bias: Array | None, block_size: int) -> Keys:
    padded = None if bias is None else _pad(bias, 2, block_size).astype(jnp.float32)
    return Keys(_pad(k, 2, block_size), _pad(v, 2, block_size), padded)


def attend(
    settings: Settings, launch: Launch, tile: int, q: Array, keys: Keys, positions: Array, union: _lists.Unions
) -> tuple[Array, Array]:
    """(out [B, T', K, G', D], lse [B, T', K, G']) of grouped queries."""

    def kernel(*refs: Any) -> None:
        forward_kernel(*refs, tile=tile, block_size=settings.block_size, scale=settings.scale)

    return _backend.triton_call(
        kernel,
        name="block_attention_forward",
        grid=(q.shape[1] // tile, q.shape[2], q.shape[0]),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )(q, *keys, positions, *union)


def query_gradients(
    settings: Settings, launch: Launch, tile: int, q: Array, keys: Keys, positions: Array, union: _lists.Unions,
    rows: tuple[Array, Array, Array],
) -> Array:  # fmt: skip
    """dq, grouped as q. rows: (dout, lse, delta), grouped."""

    def kernel(*refs: Any) -> None:
        query_kernel(*refs, tile=tile, block_size=settings.block_size, scale=settings.scale)

    return _backend.triton_call(
        kernel,
        name="block_attention_dq",
        grid=(q.shape[1] // tile, q.shape[2], q.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )(q, *keys, positions, *union, *rows)


def key_gradients(
    settings: Settings, launch: Launch, q: Array, keys: Keys, positions: Array, segments: _lists.Segments,
    rows: tuple[Array, Array, Array],
) -> Keys:  # fmt: skip
    """(dk, dv, dbias), padded as the keys."""
    size, dim = settings.block_size, q.shape[-1]
    batch, kv_heads, count = segments.block.shape

    def kernel(*refs: Any) -> None:
        gathered = max(1, launch.rows // q.shape[3])
        key_kernel(*refs, gathered=gathered, block_size=size, scale=settings.scale)

    def empty(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, kv_heads, *shape), dtype)

    parts = _backend.triton_call(
        kernel,
        name="block_attention_dkv",
        grid=(count, kv_heads, batch),
        out_shape=(empty(count, size, dim), empty(count, size, dim), keys.bias if keys.bias is None else empty(count, size)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )(q, *keys, positions, *segments[:-1], *rows)
    grads = _backend.triton_call(
        sum_kernel,
        name="block_attention_sum",
        grid=(keys.k.shape[2] // size, kv_heads, batch),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(keys)),
        num_warps=4,
    )(segments.first, *parts)
    return Keys(*grads)


FORWARD = Launch(64, 4, 3)
QUERY = Launch(64, 4, 2)
KEY = Launch(64, 4, 1)


def forward(
    settings: Settings,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bias: Float[Array, "B K S"] | None,
    block_ids: Int32[Array, "B K T J"],
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    kv_heads, size = k.shape[1], settings.block_size
    length, group = q.shape[1], q.shape[2] // kv_heads
    num_blocks = blocks.num_blocks(k.shape[2], size)
    tile = _tile(group, FORWARD.rows)
    table = _lists.bit_table(block_ids, positions, first_block, num_blocks=num_blocks, block_size=size)
    positions = _pad(positions, 1, tile, -1)
    union = _lists.unions(table, positions, tile=tile, width=min(num_blocks, tile * block_ids.shape[-1]), block_size=size)
    out, lse = attend(
        settings, FORWARD, tile, _group_heads(q, kv_heads, tile), _pad_keys(k, v, bias, size), positions, union
    )
    return _ungroup_heads(out, length, group), _ungroup_heads(lse, length, group)


def backward(
    settings: Settings,
    residuals: tuple[Any, ...],
    grads: tuple[Float[Array, "B T N D"], Float[Array, "B T N"]],
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv, dbias) from (q, k, v, bias, block_ids, positions, first_block, out, lse)."""
    q, k, v, bias, block_ids, positions, first_block, out, lse = residuals
    dout, dlse = grads
    kv_heads, tokens, size = *k.shape[1:3], settings.block_size
    length, group = q.shape[1], q.shape[2] // kv_heads
    num_blocks = blocks.num_blocks(tokens, size)
    tile = _tile(group, QUERY.rows)
    table = _lists.bit_table(block_ids, positions, first_block, num_blocks=num_blocks, block_size=size)
    positions = _pad(positions, 1, tile, -1)
    union = _lists.unions(table, positions, tile=tile, width=min(num_blocks, tile * block_ids.shape[-1]), block_size=size)
    segments = _lists.segments(table, entries=length * min(num_blocks, block_ids.shape[-1]), length=_SEGMENT)
    # softmax backward: dlogit = p * (dp - delta).
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse
    grouped, *rows = (_group_heads(x, kv_heads, tile) for x in (q, dout, lse, delta))
    keys = _pad_keys(k, v, bias, size)
    dq = query_gradients(settings, QUERY, tile, grouped, keys, positions, union, tuple(rows))
    dk, dv, dbias = key_gradients(settings, KEY, grouped, keys, positions, segments, tuple(rows))
    dbias = None if bias is None else dbias[:, :, :tokens].astype(bias.dtype)
    return _ungroup_heads(dq, length, group), dk[:, :, :tokens], dv[:, :, :tokens], dbias
