"""Block-sparse attention in Pallas-Triton: the kernels of `_forward` and `_backward` over the lists of `_lists`.

Any group size runs, padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend, blocks
from pallas_kernels._backend import pad_to_multiple
from pallas_kernels._tuning import Launch, launch_of
from pallas_kernels.block_attention import _lists
from pallas_kernels.block_attention._backward import key_kernel, query_kernel, sum_kernel
from pallas_kernels.block_attention._forward import forward_kernel
from pallas_kernels.block_attention.xla import Settings

_BLOCK_BYTES = 32 * 2**10  # of the keys of one block, the largest that was thought of
SEGMENT = 1024  # queries whose gradients one program of the key pass adds up


# Defaults, measured on an H200 with 16 query heads per KV head of 128 in bfloat16.
_FORWARD = Launch(rows=64, num_warps=4, num_stages=3)
_QUERY = Launch(rows=64, num_warps=4, num_stages=2)
_KEY = Launch(rows=64, num_warps=4, num_stages=1)
# Exact float32 products are unrolled multiply-adds; larger ones take a minute to compile.
_FLOAT32 = Launch(rows=32, num_warps=8, num_stages=1)


class Keys(NamedTuple):
    """k, v [B, K, M * P, D] and bias [B, K, M * P], padded to whole blocks."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    bias: Float[Array, "B K S"] | None


class Rows(NamedTuple):
    """What the backward pass knows of each query head, [B, T', K, G', ...]; delta = sum(out * dout) - dlse."""

    dout: Float[Array, "B T K G D"]
    lse: Float[Array, "B T K G"]
    delta: Float[Array, "B T K G"]


class Lists(NamedTuple):
    """positions [B, T'], padded to whole tiles of `tile` queries, and who selected what."""

    tile: int
    positions: Int32[Array, "B T"]
    table: Int32[Array, "B K M words"]
    union: _lists.Unions


def group_heads(x: Float[Array, "B T N *rest"], kv_heads: int, tile: int, fill: float = 0) -> Array:
    """[B, T, N, ...] -> [B, T', K, G', ...]: whole tiles, G padded to a power of two with `fill`."""
    x = x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, *x.shape[3:])
    return pad_to_multiple(pad_to_multiple(x, 1, tile), 3, _backend.next_power_of_two(x.shape[3]), fill)


def ungroup_heads(x: Array, length: int, group: int) -> Array:
    x = x[:, :length, :, :group]
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def pad_keys(k: Array, v: Array, bias: Array | None, block_size: int) -> Keys:
    padded = None if bias is None else pad_to_multiple(bias, 2, block_size).astype(jnp.float32)
    return Keys(pad_to_multiple(k, 2, block_size), pad_to_multiple(v, 2, block_size), padded)


def make_lists(
    settings: Settings,
    rows: int,
    group: int,
    tokens: int,
    block_ids: Array,
    positions: Array,
    first_block: Array | None,
) -> Lists:
    size = settings.block_size
    num_blocks = blocks.num_blocks(tokens, size)
    # A power of two of queries, at most the 32 bits that say who selected a block.
    tile = max(1, min(32, rows // _backend.next_power_of_two(group)))
    table = _lists.bit_table(block_ids, positions, first_block, num_blocks=num_blocks, block_size=size)
    positions = pad_to_multiple(positions, 1, tile, -1)
    width = min(num_blocks, tile * block_ids.shape[-1])
    return Lists(tile, positions, table, _lists.unions(table, positions, tile=tile, width=width, block_size=size))


def _over_tiles(
    kernel: Callable[..., None],
    name: str,
    settings: Settings,
    launch: Launch,
    lists: Lists,
    operands: tuple[Any, ...],
    out_shape: Any,
) -> Any:
    """Runs `kernel` once per tile of the grouped queries, operands[0]."""
    batch, padded, kv_heads = operands[0].shape[:3]

    def run(*refs: Any) -> None:
        kernel(*refs, tile=lists.tile, block_size=settings.block_size, scale=settings.scale)

    return _backend.triton_call(
        run,
        name=name,
        grid=(padded // lists.tile, kv_heads, batch),
        out_shape=out_shape,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )(*operands)


def attend(settings: Settings, launch: Launch, q: Array, keys: Keys, lists: Lists) -> tuple[Array, Array]:
    """(out [B, T', K, G', D], lse [B, T', K, G']) of grouped queries."""
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))
    operands = (q, *keys, lists.positions, *lists.union)
    return _over_tiles(forward_kernel, "block_attention_forward", settings, launch, lists, operands, shapes)


def query_gradients(settings: Settings, launch: Launch, q: Array, keys: Keys, lists: Lists, rows: Rows) -> Array:
    """dq, grouped as q."""
    operands = (q, *keys, lists.positions, *lists.union, *rows)
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return _over_tiles(query_kernel, "block_attention_dq", settings, launch, lists, operands, shape)


def key_gradients(
    settings: Settings, launch: Launch, q: Array, keys: Keys, positions: Array, segments: _lists.Segments, rows: Rows
) -> Keys:
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
        out_shape=(
            empty(count, size, dim),
            empty(count, size, dim),
            keys.bias if keys.bias is None else empty(count, size),
        ),
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


def unsupported(
    settings: Settings, q: Array, k: Array, v: Array, bias: Array | None, block_ids: Array | None,
    positions: Array | None, first_block: Array | None,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take the kernels; None where they can."""
    if block_ids is None:
        return "dense attention (block_ids=None) has no kernel here"
    if not (q.dtype == k.dtype == v.dtype):
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if block_ids.shape[-1] == 0 or q.shape[1] == 0:
        return "there is nothing to do"
    size = settings.block_size
    if not _backend.is_power_of_two(size) or not 16 <= size <= SEGMENT:
        return f"block_size must be a power of two in [16, {SEGMENT}], got {size}"
    if size * q.shape[-1] * q.dtype.itemsize > _BLOCK_BYTES:
        return f"the keys of a block must fit {_BLOCK_BYTES} bytes, got {size} x {q.shape[-1]} {q.dtype}"
    words = -(-q.shape[1] // 32)
    if q.shape[0] * k.shape[1] * blocks.num_blocks(k.shape[2], size) * words >= 2**31:
        return "the table of who selected what would have 2**31 words or more; split the batch"
    return _backend.unsupported_operand("q", q)


def _launch(kernel: str, default: Launch, settings: Settings, q: Array, group: int) -> Launch:
    size, dim = settings.block_size, q.shape[-1]
    if q.dtype == jnp.float32:
        default = _FLOAT32
    elif size * dim * q.dtype.itemsize > _BLOCK_BYTES // 2:  # no shared memory for loads ahead of their use
        default = default._replace(num_stages=1)
    group = _backend.next_power_of_two(group)
    return launch_of(kernel, default, dim=dim, group=group, dtype=q.dtype.name, block_size=size)


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
    kv_heads, tokens = k.shape[1:3]
    length, group = q.shape[1], q.shape[2] // kv_heads
    launch = _launch("block_attention_forward", _FORWARD, settings, q, group)
    lists = make_lists(settings, launch.rows, group, tokens, block_ids, positions, first_block)
    keys = pad_keys(k, v, bias, settings.block_size)
    out, lse = attend(settings, launch, group_heads(q, kv_heads, lists.tile), keys, lists)
    return ungroup_heads(out, length, group), ungroup_heads(lse, length, group)


def backward(
    settings: Settings,
    residuals: tuple[Any, ...],
    grads: tuple[Float[Array, "B T N D"], Float[Array, "B T N"]],
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv, dbias) from (q, k, v, bias, block_ids, positions, first_block, out, lse)."""
    q, k, v, bias, block_ids, positions, first_block, out, lse = residuals
    dout, dlse = grads
    kv_heads, tokens = k.shape[1:3]
    length, group = q.shape[1], q.shape[2] // kv_heads
    by_query = _launch("block_attention_dq", _QUERY, settings, q, group)
    by_key = _launch("block_attention_dkv", _KEY, settings, q, group)
    # A query that sees nothing (or only a bias of -inf) takes no part, whatever it and its gradient hold.
    blind = jnp.isneginf(lse).reshape(*lse.shape[:2], kv_heads, group).all(-1)
    block_ids = jnp.where(jnp.moveaxis(blind, 2, 1)[..., None], -1, block_ids)
    lists = make_lists(settings, by_query.rows, group, tokens, block_ids, positions, first_block)
    entries = length * min(lists.table.shape[2], block_ids.shape[-1])
    segments = _lists.segments(lists.table, entries=entries, length=SEGMENT)
    # softmax backward: dlogit = p * (dp - delta).
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse
    grouped = group_heads(q, kv_heads, lists.tile)
    # Heads that pad the group get weight 0, which a log-sum-exp of 0 would not give them.
    fills = ((dout, 0.0), (lse, _backend.LARGE), (delta, 0.0))
    rows = Rows(*(group_heads(x, kv_heads, lists.tile, fill) for x, fill in fills))
    keys = pad_keys(k, v, bias, settings.block_size)
    dq = query_gradients(settings, by_query, grouped, keys, lists, rows)
    dk, dv, dbias = key_gradients(settings, by_key, grouped, keys, lists.positions, segments, rows)
    bias_grad = None if bias is None or dbias is None else dbias[:, :, :tokens].astype(bias.dtype)
    return ungroup_heads(dq, length, group), dk[:, :, :tokens], dv[:, :, :tokens], bias_grad
