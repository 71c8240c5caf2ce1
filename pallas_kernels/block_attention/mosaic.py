"""The forward pass in Pallas Mosaic GPU, for Hopper: two warpgroups compute, a third one loads blocks ahead of them.

A tile of 128 query rows shares each block that it loads: half the traffic of the Triton kernel's tiles, which is what
limits that one. While one warpgroup takes exponentials, the other has the tensor cores. Blocks are visited in pairs.
Dense attention visits blocks by their number, and masks by positions alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend, blocks
from pallas_kernels._backend import LARGE, Softmax, plgpu
from pallas_kernels.block_attention import _lists, triton
from pallas_kernels.block_attention.xla import Settings
from pallas_kernels.varying import alike, axes_of, struct, varying

_ROWS = 64  # of one warpgroup: what one wgmma multiplies
_BLOCK = 64
_PAIR = 2
_STAGES = 2  # pairs of blocks in shared memory: 160 KiB of 227

_ROW_VECTOR = plgpu.Layout.WGMMA.reduce(1)
_KEY_VECTOR = plgpu.Layout.WGMMA.reduce(0)


def unsupported(
    settings: Settings, q: Array, k: Array, v: Array, bias: Array | None, block_ids: Array | None,
    positions: Array | None, first_block: Array | None,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take the kernel; None where they can."""
    group = q.shape[2] // k.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    chooses_blocks = block_ids is None and (first_block is None or settings.block_size % _BLOCK == 0)
    if q.shape[-1] != 128 or not (chooses_blocks or settings.block_size == _BLOCK):
        return f"it takes blocks of {_BLOCK} and a head dim of 128, got {settings.block_size} and {q.shape[-1]}"
    if _backend.next_power_of_two(group) not in (8, 16):
        return f"it takes 5 to 16 query heads per KV head, got {group}"
    return triton.unsupported(settings, q, k, v, bias, block_ids, positions, first_block)


def _add_products(acc: Any, weights: Any, values: Any, meanwhile: Callable[[], None]) -> Any:
    """acc + the sum of weights[i] @ values[i]; `meanwhile` is called while the tensor cores multiply."""

    def add(ref: Any) -> None:
        for i, factor in enumerate(weights):
            plgpu.wgmma(ref, factor, values.at[i])
        meanwhile()

    return _backend.run_state(add)(plgpu.ACC.init(acc))


class _Visits(NamedTuple):
    """What a tile visits, in pairs from `begin` on; those up to `whole` lie wholly before every query.

    block(i): the i-th block; the last one again beyond the end. masked(i): the block whose mask the i-th one has, which
    nobody sees beyond the end. selected(i): bits of who selected the i-th block, None where only the mask tells.
    """

    pairs: Any
    whole: Any
    block: Callable[[Any], Any]
    masked: Callable[[Any], Any]
    selected: Callable[[Any], Any]


def _visits_of(lists: _lists.Unions | _lists.Prefixes) -> tuple[Any, Any, Any, _Visits]:
    """(tile, KV head and row of this program, what it visits)."""
    tile, head, row = (lax.axis_index(name) for name in ("tile", "head", "row"))
    if isinstance(lists, _lists.Prefixes):
        tile = lists.counts.shape[1] - 1 - tile  # the longest first: what starts last is done soon
        begin, whole, end = (lists.counts[row, tile, i] for i in range(3))
        block = lambda i: jnp.minimum(begin + i, jnp.maximum(end - 1, 0))
        visits = _Visits(
            (end - begin + 1) // _PAIR, (whole - begin) // _PAIR, block, lambda i: begin + i, lambda i: None
        )
        return tile, head, row, visits

    whole, every = (lists.counts[row, head, tile, i] for i in range(2))

    def entry(list_: Any, index: Any) -> Any:
        return list_[row, head, tile, jnp.clip(index, 0, jnp.maximum(every - 1, 0))]

    def selected(i: Any) -> Any:
        return jnp.where(i < every, entry(lists.members, i), 0)

    block = lambda i: entry(lists.block_ids, i)
    return tile, head, row, _Visits((every + 1) // _PAIR, whole // _PAIR, block, block, selected)


def _kernel(refs: Any, scoped: Any, *, tokens: int, group: int, dim: int, softmax: Softmax, dtype: Any) -> None:
    """tokens: queries of one warpgroup, tokens * group = 64 rows."""
    q, k, v, bias, row_positions, lists, out, tops, log_totals = refs
    (rows_smem, k_smem, v_smem, bias_smem, top_smem, log_total_smem), loaded, used, turn = scoped
    q_loaded, k_loaded, v_loaded = loaded
    warpgroup = lax.axis_index("warpgroup")
    tile, head, row, visits = _visits_of(lists)
    pairs = visits.pairs

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @_backend.when(warpgroup < 2)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows, *normaliser = (x.at[warpgroup] for x in (rows_smem, top_smem, log_total_smem))
        first = (tile * 2 + warpgroup) * tokens
        for i in range(tokens):
            plgpu.copy_gmem_to_smem(
                q.at[row, first + i, head], rows.at[_backend.ds(i * group, group)], q_loaded.at[warpgroup]
            )
        plgpu.barrier_wait(q_loaded.at[warpgroup])
        index = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _BLOCK), 0, layout=plgpu.Layout.WGMMA)
        bit = jnp.max(index, axis=1) // group + warpgroup * tokens

        def of_rows(x: Any) -> Any:
            """[B, T' * G] -> of the rows of this warpgroup."""
            mine = x.at[row, _backend.ds(first * group, _ROWS)]
            return plgpu.load(mine, layout=_ROW_VECTOR, optimized=False)

        @_backend.when(pairs > 0)
        def _() -> None:
            plgpu.barrier_wait(k_loaded.at[0])

        _backend.when(warpgroup == 1)(take_turns)

        def visit(causal: bool) -> Any:
            def body(pair: Any, carry: Any) -> Any:
                acc, top, total, chosen = carry
                slot = lax.rem(pair, jnp.array(_STAGES, pair.dtype))
                following = tuple(visits.selected(_PAIR * (pair + 1) + i) for i in range(_PAIR))

                def logits_of(*accs: Any) -> Any:
                    for i, ref in enumerate(accs):
                        plgpu.wgmma(ref, rows, k_smem.at[slot, i].transpose((1, 0)))
                    take_turns()
                    return tuple(ref[...] for ref in accs)

                empty = plgpu.ACC((_ROWS, _BLOCK), jnp.float32)
                logits = list(_backend.run_scoped(logits_of, *(empty,) * _PAIR))
                new_top = top
                is_member: list[Any] = []
                if causal:
                    position = of_rows(row_positions)
                    token = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _BLOCK), 1, layout=plgpu.Layout.WGMMA)
                for i in range(_PAIR):
                    added = None
                    if bias is not None:
                        added = plgpu.load(bias_smem.at[slot, i], layout=_KEY_VECTOR, optimized=False)
                        added = lax.broadcast_in_dim(added, logits[i].shape, [1])
                    logits[i] = softmax.logits(logits[i], added)
                    is_member.append(None)
                    if chosen[i] is not None:
                        is_member[i] = ((jnp.full((_ROWS,), 0, jnp.int32) + chosen[i]) >> bit) & 1 != 0
                    if causal:
                        block, takes_part = visits.masked(_PAIR * pair + i), is_member[i]
                        if isinstance(lists, _lists.Prefixes) and lists.first is not None:
                            takes_part = of_rows(lists.first) <= block
                        last = position if takes_part is None else jnp.where(takes_part, position, -1)
                        seen = token + block * _BLOCK <= lax.broadcast_in_dim(last, logits[i].shape, [0])
                        logits[i] = jnp.where(seen, logits[i], -jnp.inf)
                    highest = logits[i].max(axis=1)
                    if is_member[i] is not None:
                        highest = jnp.where(is_member[i], highest, -LARGE)
                    new_top = jnp.maximum(new_top, highest)
                plgpu.barrier_arrive(used[0].at[slot])
                decay = softmax.decay(top - new_top)
                total *= decay
                weights = []
                for i in range(_PAIR):
                    # Subtracting LARGE gives the rows that did not select this block weight 0.
                    subtracted = new_top if is_member[i] is None else jnp.where(is_member[i], new_top, LARGE)
                    p = softmax.weights(logits[i] - lax.broadcast_in_dim(subtracted, logits[i].shape, [0]))
                    total += p.sum(axis=1)
                    weights.append(p.astype(dtype))
                acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
                acc, total, new_top, *weights = lax.optimization_barrier((acc, total, new_top, *weights))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_loaded.at[slot])
                plgpu.barrier_wait(turn)

                def await_next_keys() -> None:
                    @_backend.when(pair + 1 < pairs)
                    def _() -> None:
                        plgpu.barrier_wait(k_loaded.at[lax.rem(pair + 1, jnp.array(_STAGES, pair.dtype))])

                acc = _add_products(acc, weights, v_smem.at[slot], await_next_keys)
                plgpu.barrier_arrive(used[1].at[slot])
                return acc, new_top, total, following

            return body

        zeros = jnp.full((_ROWS,), 0, jnp.float32)
        carry = (
            plgpu.layout_cast(jnp.full((_ROWS, dim), 0, jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(zeros - LARGE, _ROW_VECTOR),
            plgpu.layout_cast(zeros, _ROW_VECTOR),
            tuple(visits.selected(jnp.int32(i)) for i in range(_PAIR)),
        )
        carry = lax.fori_loop(0, visits.whole, visit(causal=False), carry)
        acc, top, total, _ = lax.fori_loop(visits.whole, pairs, visit(causal=True), carry)
        _backend.when(warpgroup == 0)(take_turns)
        blind = top <= -LARGE  # not `total == 0`: NaN must come out as NaN
        if isinstance(lists, _lists.Prefixes):  # which blocks that a tile sees whole are not masked for its padding
            blind |= of_rows(row_positions) < 0
        total = jnp.where(blind, 1.0, total)
        acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
        rows[...] = jnp.where(lax.broadcast_in_dim(blind, acc.shape, [0]), 0.0, acc).astype(dtype)
        normaliser[0][...] = jnp.where(blind, LARGE, top)
        normaliser[1][...] = softmax.log_total(total)
        plgpu.commit_smem()
        for i in range(tokens):
            plgpu.copy_smem_to_gmem(rows.at[_backend.ds(i * group, group)], out.at[row, first + i, head])
        for source, target in zip(normaliser, (tops, log_totals), strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[row, head, _backend.ds(first * group, _ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @_backend.when(warpgroup == 2)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @_backend.loop(0, pairs)
        def _(pair: Any) -> None:
            slot = lax.rem(pair, jnp.array(_STAGES, pair.dtype))
            spans = [_backend.ds(visits.block(_PAIR * pair + i) * _BLOCK, _BLOCK) for i in range(_PAIR)]

            def copy(source: Any, target: Any, barrier: Any) -> None:
                for i, span in enumerate(spans):
                    plgpu.copy_gmem_to_smem(source.at[row, head, span], target.at[slot, i], barrier.at[slot])

            def free(index: int) -> None:
                _backend.when(pair >= _STAGES)(lambda: plgpu.barrier_wait(used[index].at[slot]))

            free(0)
            copy(k, k_smem, k_loaded)
            if bias is not None:
                copy(bias, bias_smem, k_loaded)
            free(1)
            copy(v, v_smem, v_loaded)


def _unseen_as_zero(
    v: Float[Array, "B K S D"], lists: triton.Lists, first_block: Int32[Array, "B M"] | None
) -> Float[Array, "B K S D"]:
    """v with 0 for the tokens that no query sees: they may be unwritten memory, and 0 * NaN is NaN."""
    if lists.table is None:
        sizes = {"num_blocks": blocks.num_blocks(v.shape[2], _BLOCK), "block_size": _BLOCK}
        last = _lists.last_positions(lists.positions, first_block, **sizes)[:, None]
    else:
        last = _lists.last_seen(lists.table, lists.positions)
    last = jnp.repeat(last, _BLOCK, axis=-1)[..., : v.shape[2]]
    return jnp.where((jnp.arange(v.shape[2], dtype=jnp.int32) <= last)[..., None], v, 0)


def forward(
    settings: Settings,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bias: Float[Array, "B K S"] | None,
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"], triton.Normaliser]:
    """(out, lse, what `triton.backward` needs)."""
    batch, length, heads, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    if block_ids is None:
        settings, first_block = triton.own_blocks(settings, _BLOCK, num_keys, first_block)
    lists = triton.make_lists(settings, 2 * _ROWS, heads // kv_heads, num_keys, block_ids, positions, first_block)
    keys = triton.pad_keys(k, _unseen_as_zero(v, lists, first_block), bias, _BLOCK)
    grouped = triton.group_heads(q, kv_heads, lists.tile)
    padded, group = grouped.shape[1], grouped.shape[3]
    tokens = _ROWS // group
    softmax = Softmax.of(settings.scale, bias is not None, num_keys, q.dtype, _backend.MOSAIC)

    def of_rows(x: Array) -> Array:
        """Each query's number for each of its heads."""
        return jnp.broadcast_to(x[..., None], (batch, padded, group)).reshape(batch, -1)

    visits = lists.visits
    if isinstance(visits, _lists.Prefixes) and visits.first is not None:
        visits = visits._replace(first=of_rows(visits.first))
    operands, tree = jax.tree.flatten(alike((grouped, *keys, of_rows(lists.positions), visits)))

    def block_attention_forward(*flat: Any) -> None:
        refs = (*jax.tree.unflatten(tree, flat[: len(operands)]), *flat[len(operands) :])
        tiled: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        memory = (
            plgpu.SMEM((2, _ROWS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((_STAGES, _PAIR, _BLOCK, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((_STAGES, _PAIR, _BLOCK, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((_STAGES, _PAIR, _BLOCK), jnp.float32),
            plgpu.SMEM((2, _ROWS), jnp.float32),
            plgpu.SMEM((2, _ROWS), jnp.float32),
        )
        loaded = (
            plgpu.Barrier(num_arrivals=tokens, num_barriers=2),
            plgpu.Barrier(num_arrivals=_PAIR * (1 if bias is None else 2), num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=_PAIR, num_barriers=_STAGES),
        )
        used = (plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),) * 2

        def run(*scoped: Any) -> None:
            _kernel(refs, scoped, tokens=tokens, group=group, dim=dim, softmax=softmax, dtype=q.dtype)

        _backend.run_scoped(run, memory, loaded, used, plgpu.Barrier(num_arrivals=2), collective_axes="warpgroup")

    axes = axes_of(operands)
    one = struct((batch, kv_heads, padded * group), jnp.float32, axes)
    found = plgpu.kernel(
        block_attention_forward,
        out_type=[struct(grouped.shape, grouped.dtype, axes), one, one],
        grid=(padded // lists.tile, kv_heads, batch),
        grid_names=("tile", "head", "row"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    # JAX forgets what `out_type` says of axes. A result that seemed the same on all devices would have its cotangents
    # summed over them.
    out, *normaliser = varying(tuple(found), axes)
    by_query = (jnp.moveaxis(x.reshape(batch, kv_heads, padded, group), 1, 2) for x in normaliser)
    ungrouped = (triton.ungroup_heads(x, length, heads // kv_heads) for x in (out, *by_query))
    return triton.outputs(settings, bias, *ungrouped)
