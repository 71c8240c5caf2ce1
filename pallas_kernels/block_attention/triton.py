"""Block attention in Pallas-Triton: the kernels of `_forward` and `_backward` over the lists of `_lists`.

Any group size runs, padded to a power of two. Dense attention cuts its keys into blocks of the kernels' own choice.
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
_LEAST_KEYS = 16  # of a block: what a matrix product takes
SEGMENT = 1024  # queries whose gradients one program of the key pass adds up


# Defaults, measured on an H200 with 16 query heads per KV head of 128 in bfloat16.
_FORWARD = Launch(rows=64, num_warps=4, num_stages=3)
_QUERY = Launch(rows=64, num_warps=4, num_stages=2)
_KEY = Launch(rows=64, num_warps=4, num_stages=1)
# Exact float32 products are unrolled multiply-adds; larger ones take a minute to compile.
_FLOAT32 = Launch(rows=32, num_warps=8, num_stages=1)
# Dense attention is bound by products: larger tiles.
_DENSE_FORWARD = Launch(rows=128, num_warps=8, num_stages=2)
_DENSE_PIECES = 4  # of the queries that see a block: more would fill the device no better, and take memory


class Keys(NamedTuple):
    """k, v [B, K, M * P, D] and bias [B, K, M * P], padded to whole blocks."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    bias: Float[Array, "B K S"] | None


class Normaliser(NamedTuple):
    """Of each query head its highest logit, in the unit of `Softmax` and LARGE where it sees nothing, and the natural
    logarithm of its sum of weights: lse in two numbers, for a large one would leave no room for the other in one."""

    top: Float[Array, "B T *heads"]
    log_total: Float[Array, "B T *heads"]


class Rows(NamedTuple):
    """What the backward pass knows of each query head, [B, T', K, G', ...]; delta = sum(out * dout) - dlse."""

    dout: Float[Array, "B T K G D"]
    top: Float[Array, "B T K G"]
    log_total: Float[Array, "B T K G"]
    delta: Float[Array, "B T K G"]


class Lists(NamedTuple):
    """positions [B, T'], padded to whole tiles of `tile` queries, and what they visit; table: None where dense."""

    tile: int
    positions: Int32[Array, "B T"]
    table: Int32[Array, "B K M words"] | None
    visits: _lists.Unions | _lists.Prefixes


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
    block_ids: Array | None,
    positions: Array,
    first_block: Array | None,
) -> Lists:
    size = settings.block_size
    num_blocks = blocks.num_blocks(tokens, size)
    tile = max(1, rows // _backend.next_power_of_two(group))
    if block_ids is None:
        positions = pad_to_multiple(positions, 1, tile, -1)
        sizes = {"tile": tile, "num_blocks": num_blocks, "block_size": size}
        return Lists(tile, positions, None, _lists.prefixes(positions, first_block, **sizes))
    tile = min(32, tile)  # bits say who selected a block
    table = _lists.bit_table(block_ids, positions, first_block, num_blocks=num_blocks, block_size=size)
    positions = pad_to_multiple(positions, 1, tile, -1)
    width = min(num_blocks, tile * block_ids.shape[-1])
    return Lists(tile, positions, table, _lists.unions(table, positions, tile=tile, width=width, block_size=size))


def own_blocks(settings: Settings, keys: int, tokens: int, first_block: Array | None) -> tuple[Settings, Array | None]:
    """Dense attention over blocks of `keys` tokens: only where documents start depends on those of the caller."""
    keys = min(keys, settings.block_size & -settings.block_size) if first_block is not None else keys
    if first_block is not None:
        ratio = settings.block_size // keys
        first_block = jnp.repeat(first_block * ratio, ratio, axis=-1)[:, : blocks.num_blocks(tokens, keys)]
    return settings._replace(block_size=keys), first_block


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


def attend(settings: Settings, launch: Launch, q: Array, keys: Keys, lists: Lists) -> tuple[Array, Array, Array]:
    """(out [B, T', K, G', D], the two of a Normaliser [B, T', K, G']) of grouped queries."""
    one = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), one, one)
    operands = (q, *keys, lists.positions, lists.visits)
    return _over_tiles(forward_kernel, "block_attention_forward", settings, launch, lists, operands, shapes)


def query_gradients(settings: Settings, launch: Launch, q: Array, keys: Keys, lists: Lists, rows: Rows) -> Array:
    """dq, grouped as q."""
    operands = (q, *keys, lists.positions, lists.visits, *rows)
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
    size = settings.block_size
    if not (q.dtype == k.dtype == v.dtype):
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if block_ids is None:
        if first_block is not None and size % _LEAST_KEYS:
            return f"documents of dense attention must start on multiples of {_LEAST_KEYS} tokens, got blocks of {size}"
        return _backend.unsupported_operand("q", q)
    if block_ids.shape[-1] == 0:
        return "there is nothing to do"
    if not _backend.is_power_of_two(size) or not 16 <= size <= SEGMENT:
        return f"block_size must be a power of two in [16, {SEGMENT}], got {size}"
    if size * q.shape[-1] * q.dtype.itemsize > _BLOCK_BYTES:
        return f"the keys of a block must fit {_BLOCK_BYTES} bytes, got {size} x {q.shape[-1]} {q.dtype}"
    words = -(-q.shape[1] // 32)
    if q.shape[0] * k.shape[1] * blocks.num_blocks(k.shape[2], size) * words >= 2**31:
        return "the table of who selected what would have 2**31 words or more; split the batch"
    return _backend.unsupported_operand("q", q)


def _launch(kernel: str, default: Launch, settings: Settings, q: Array, group: int, *, dense: bool) -> Launch:
    """Of `kernel`; dense ones have names of their own and choose their blocks, `keys`."""
    size, dim = settings.block_size, q.shape[-1]
    row_bytes = dim * q.dtype.itemsize
    group = _backend.next_power_of_two(group)
    if q.dtype == jnp.float32:
        default = _FLOAT32
    if dense:
        default = default._replace(keys=max(_LEAST_KEYS, min(default.keys, _BLOCK_BYTES // 2 // row_bytes)))
        return launch_of(f"{kernel}_dense", default, dim=dim, group=group, dtype=q.dtype.name)
    if q.dtype != jnp.float32 and size * row_bytes > _BLOCK_BYTES // 2:  # no room for loads ahead of their use
        default = default._replace(num_stages=1)
    return launch_of(kernel, default, dim=dim, group=group, dtype=q.dtype.name, block_size=size)


def forward(
    settings: Settings,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bias: Float[Array, "B K S"] | None,
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"], Normaliser]:
    """(out, lse, what `backward` needs)."""
    kv_heads, tokens = k.shape[1:3]
    length, group = q.shape[1], q.shape[2] // kv_heads
    dense = block_ids is None
    launch = _launch("block_attention_forward", _DENSE_FORWARD if dense else _FORWARD, settings, q, group, dense=dense)
    if dense:
        settings, first_block = own_blocks(settings, launch.keys, tokens, first_block)
    lists = make_lists(settings, launch.rows, group, tokens, block_ids, positions, first_block)
    keys = pad_keys(k, v, bias, settings.block_size)
    found = attend(settings, launch, group_heads(q, kv_heads, lists.tile), keys, lists)
    return outputs(settings, bias, *(ungroup_heads(x, length, group) for x in found))


def outputs(
    settings: Settings, bias: Array | None, out: Array, top: Array, log_total: Array
) -> tuple[Array, Array, Normaliser]:
    """(out, lse, what `backward` needs)."""
    softmax = _backend.Softmax.of(settings.scale, bias is not None, 1, out.dtype)
    return out, softmax.log_sum_exp(top, log_total), Normaliser(top, log_total)


def backward(
    settings: Settings,
    residuals: tuple[Any, ...],
    grads: tuple[Float[Array, "B T N D"], Float[Array, "B T N"]],
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv, dbias) from (q, k, v, bias, block_ids, positions, first_block, out, normaliser)."""
    q, k, v, bias, block_ids, positions, first_block, out, (top, log_total) = residuals
    dout, dlse = grads
    kv_heads, tokens = k.shape[1:3]
    length, group = q.shape[1], q.shape[2] // kv_heads
    dense = block_ids is None
    by_query = _launch("block_attention_dq", _QUERY, settings, q, group, dense=dense)
    by_key = _launch("block_attention_dkv", _KEY, settings, q, group, dense=dense)
    # softmax backward: dlogit = p * (dp - delta).
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse
    # A query that sees nothing (or only a bias of -inf) takes no part, whatever it and its gradient hold.
    blind = top >= _backend.LARGE
    if dense:
        q, dout = (jnp.where(blind[..., None], 0, x) for x in (q, dout))
        delta = jnp.where(blind, 0, delta)
        settings, first_block = own_blocks(settings, min(by_query.keys, by_key.keys), tokens, first_block)
    else:
        nobody = jnp.moveaxis(blind.reshape(*top.shape[:2], kv_heads, group).all(-1), 2, 1)
        block_ids = jnp.where(nobody[..., None], -1, block_ids)
    lists = make_lists(settings, by_query.rows, group, tokens, block_ids, positions, first_block)
    size, num_blocks = settings.block_size, blocks.num_blocks(tokens, settings.block_size)
    if lists.table is None:
        pieces = max(SEGMENT, -(-length // _DENSE_PIECES))
        sizes = {"kv_heads": kv_heads, "num_blocks": num_blocks, "block_size": size, "length": pieces}
        segments = _lists.ranges(lists.positions, first_block, **sizes)
    else:
        entries = length * min(num_blocks, block_ids.shape[-1])
        segments = _lists.segments(lists.table, entries=entries, length=SEGMENT, block_size=size)
    grouped = group_heads(q, kv_heads, lists.tile)
    # Heads that pad the group get weight 0, which a highest logit of 0 would not give them.
    fills = ((dout, 0.0), (top, _backend.LARGE), (log_total, 0.0), (delta, 0.0))
    rows = Rows(*(group_heads(x, kv_heads, lists.tile, fill) for x, fill in fills))
    keys = pad_keys(k, v, bias, settings.block_size)
    dq = query_gradients(settings, by_query, grouped, keys, lists, rows)
    dk, dv, dbias = key_gradients(settings, by_key, grouped, keys, lists.positions, segments, rows)
    bias_grad = None if bias is None or dbias is None else dbias[:, :, :tokens].astype(bias.dtype)
    return ungroup_heads(dq, length, group), dk[:, :, :tokens], dv[:, :, :tokens], bias_grad
