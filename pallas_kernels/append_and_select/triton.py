"""Three launches: the token and the weights of windows, in chunks of windows; the order of blocks; selection and slots.

The first two use the whole device. The last, of few warps per row and KV head, is all waiting.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import _backend
from pallas_kernels._backend import LOG2_E
from pallas_kernels._tuning import Launch, launch_of
from pallas_kernels.append_and_select._scores import Geometry, append_kernel, keys_kernel
from pallas_kernels.append_and_select._select import Picks, select_kernel
from pallas_kernels.append_and_select.arguments import Projected, Selectable, Sizes
from pallas_kernels.append_token.triton import unsupported as append_unsupported
from pallas_kernels.decode_attention import Residence, Token

_DEFAULT = Launch(rows=16, num_warps=2, num_stages=1, keys=64)
_WEIGHTS = 4096  # weights of windows that a program of the second launch reads
_FEW_CHUNKS = 32  # with more, programs that read the maxima of all of them should be fewer
_PROGRAMS, _MOST_IN_A_ROW = 2048, 4  # of the first launch; chunks of one
_PER_WARP = 256  # blocks that a warp of the last launch has lanes for
_MOST_BLOCKS = 4096
_MOST_LISTED = 1024  # blocks of a selection, and slots
_MOST_RATIO = 64


def unsupported(
    projected: Projected, selectable: Selectable, forced_block_ids: Array | None, positions: Array, layer: Array,
    *, sizes: Sizes,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take the kernels; None where they can."""
    (qkv, cos, sin), (summaries, scale, delta, table) = projected, selectable
    pooled, ratio = summaries.pooled_keys, sizes.block_size // sizes.stride
    if pooled is not None:
        if pooled[0].dtype != qkv.dtype:
            return f"qkv and pooled keys must have one dtype, got {qkv.dtype} and {pooled[0].dtype}"
        if (reason := _backend.unsupported_operand("qkv", qkv)) is not None:
            return reason
    if not _backend.is_power_of_two(ratio) or ratio > _MOST_RATIO:
        return f"block_size / stride must be a power of two up to {_MOST_RATIO}, got {ratio}"
    if sizes.num_blocks > _MOST_BLOCKS or sizes.num_blocks**2 * sizes.block_size >= 2**31:
        got = f"{sizes.num_blocks} of {sizes.block_size} tokens"
        return f"it takes {_MOST_BLOCKS} blocks, and num_blocks**2 * block_size below 2**31, got {got}"
    slots = 0 if table is None else table[0].shape[-1]
    if max(sizes.num_selected_blocks, slots) > _MOST_LISTED:
        return f"it takes {_MOST_LISTED} blocks of a selection and slots, got {sizes.num_selected_blocks} and {slots}"
    return append_unsupported(qkv, cos, sin, scale, delta, summaries, positions, layer, stride=sizes.stride)


def append_and_select(
    projected: Projected,
    selectable: Selectable,
    forced_block_ids: Int32[Array, "L B K J"] | None,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    sizes: Sizes,
) -> tuple[Token, Selectable, Residence, Int32[Array, "B K"]]:
    number = jax.lax.reshape(layer, (1,))
    geometry, launch = _geometry(projected, selectable, sizes)
    token, summaries, weights = _append(projected, selectable, positions, number, geometry, launch)
    keys = _keys(weights, summaries, positions, number, geometry, sizes)
    table, residence, count = _select(keys, selectable.table, forced_block_ids, positions, number, sizes)
    return token, selectable._replace(summaries=summaries, table=table), residence, count


def _geometry(projected: Projected, selectable: Selectable, sizes: Sizes) -> tuple[Geometry, Launch]:
    group, dim = projected.qkv.shape[2] - 2, projected.qkv.shape[3]
    rows = max(_backend.LEAST_ROWS, _backend.next_power_of_two(group))
    launch = launch_of("append_and_select", _DEFAULT, dim=dim, group=rows, dtype=projected.qkv.dtype.name)
    keys_cache, _, importance_cache = selectable.summaries
    windows = (importance_cache if keys_cache is None else keys_cache)[0].shape[3]
    keys = max(launch.keys, sizes.block_size // sizes.stride)
    chunks = 0 if keys_cache is None else -(-windows // keys)
    # Long rows of large batches fill the device with fewer programs, which then share what each of them begins with.
    work = projected.qkv.shape[0] * projected.qkv.shape[1] * chunks
    in_a_row = min(_MOST_IN_A_ROW, _backend.next_power_of_two(max(1, work // _PROGRAMS)))
    together = max(1, (_WEIGHTS if chunks <= _FEW_CHUNKS else 2 * _WEIGHTS) // (keys * rows))
    factor = dim**-0.5 * LOG2_E
    geometry = Geometry(keys, chunks, windows, sizes.block_size, sizes.stride, group, rows, factor, in_a_row, together)
    return geometry, launch


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _given(operands: tuple[Any, ...]) -> int:
    """Where the operand after these stands."""
    return sum(x is not None for x in operands)


def _append(
    projected: Projected, selectable: Selectable, positions: Array, number: Array, geometry: Geometry, launch: Launch
) -> tuple[Token, Any, tuple[Any, ...]]:
    """The token, the summaries with it, and its weights of windows; of those three None without pooled keys."""
    qkv, summaries = projected.qkv, selectable.summaries
    batch, kv_heads, _, dim = qkv.shape
    weighed: tuple[Any, ...] = (None,) * 3
    if summaries.pooled_keys is not None:
        part = jax.ShapeDtypeStruct((batch, kv_heads, geometry.chunks, geometry.rows), jnp.float32)
        weights = (batch, kv_heads, geometry.chunks * geometry.keys, geometry.rows)
        weighed = (jax.ShapeDtypeStruct(weights, jnp.float32), part, part)

    def kernel(*refs: Any) -> None:
        append_kernel(*refs, geometry=geometry)

    operands = (number, positions, *projected, selectable.scale, selectable.delta)
    kept = range(len(jax.tree.leaves(summaries)))
    heads = lambda count: jax.ShapeDtypeStruct((batch, count, dim), qkv.dtype)
    q, k, v, summaries, *weighed_windows = _backend.triton_call(
        kernel,
        name="append_and_weigh",
        grid=(geometry.programs + 1, kv_heads, batch),
        out_shape=(heads(kv_heads * geometry.group), heads(kv_heads), heads(kv_heads), _like(summaries), *weighed),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        aliases={_given(operands) + i: 3 + i for i in kept},
    )(*operands, summaries)
    return Token(q, k, v), summaries, tuple(weighed_windows)


def _keys(
    weights: tuple[Any, ...], summaries: Any, positions: Array, number: Array, geometry: Geometry, sizes: Sizes
) -> tuple[Any, Any]:
    """int32 [B, K, lanes]: the order of blocks by query score and by importance; None for what there is not.

    Only of blocks that may be chosen by score: those of the last window are taken without looking.
    """
    pooled = summaries.pooled_importance
    kv_heads = jax.tree.leaves(summaries)[0].shape[2]
    looked_at, together = max(1, sizes.num_blocks - sizes.num_local_blocks), geometry.blocks_together
    lanes = max(_backend.next_power_of_two(looked_at), together)
    keys = jax.ShapeDtypeStruct((positions.shape[0], kv_heads, lanes), jnp.int32)

    def kernel(*refs: Any) -> None:
        keys_kernel(*refs, geometry=geometry)

    by_query, by_importance = _backend.triton_call(
        kernel,
        name="keys_of_blocks",
        grid=(-(-looked_at // together), kv_heads, positions.shape[0]),
        out_shape=(None if weights[0] is None else keys, None if pooled is None else keys),
        num_warps=4 if geometry.chunks <= _FEW_CHUNKS else 8,
    )(number, positions, *weights, None if pooled is None else pooled[0])
    return by_query, by_importance


def _select(
    keys: tuple[Any, Any], table: Any, forced: Array | None, positions: Array, number: Array, sizes: Sizes
) -> tuple[Any, Residence, Array]:
    """The table with what is selected, where that lies, and how much of it must be loaded."""
    batch, kv_heads, lanes = next(x for x in keys if x is not None).shape
    picks = Picks(
        sizes.num_blocks, sizes.block_size, sizes.num_selected_blocks, sizes.num_sink_blocks, sizes.num_local_blocks,
        sizes.num_query_blocks,
    )  # fmt: skip
    numbers = lambda count: jax.ShapeDtypeStruct((batch, kv_heads, count), jnp.int32)
    listed = numbers(picks.selected)
    held = None if table is None else tuple(table)
    of_table: tuple[Any, ...] = (None,) * 6
    if table is not None:
        places = numbers(max(lanes, picks.num_blocks))
        count = jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32)
        of_table = (listed, listed, _like(held), count, places, listed)

    def kernel(*refs: Any) -> None:
        select_kernel(*refs, lanes=lanes, picks=picks)

    operands = (number, positions, *keys, forced)
    aliased = _given(operands)
    ids, slots, loads, held, count, *_ = _backend.triton_call(
        kernel,
        name="select_and_resolve",
        grid=(kv_heads, batch),
        out_shape=(listed, *of_table),
        num_warps=max(1, lanes // _PER_WARP),
        aliases={} if table is None else {aliased: 3, aliased + 1: 4},
    )(*operands, held)
    if table is None:
        return None, Residence(ids, ids, None), jnp.zeros((batch, kv_heads), jnp.int32)
    return jax.tree.unflatten(jax.tree.structure(table), held), Residence(ids, slots, loads), count
