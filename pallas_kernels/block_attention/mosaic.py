"""The forward pass in Pallas Mosaic GPU, for Hopper: two warpgroups compute, a third one loads blocks ahead of them.

A tile of 128 query rows shares each block that it loads: half the traffic of the Triton kernel's tiles, which is what
limits that one. While one warpgroup takes exponentials, the other has the tensor cores. Blocks are visited in pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, LN_2, LOG2_E, plgpu
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
    if q.shape[-1] != 128 or settings.block_size != _BLOCK:
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


def _kernel(refs: Any, scoped: Any, *, tokens: int, group: int, dim: int, scale: float, dtype: Any) -> None:
    """tokens: queries of one warpgroup, tokens * group = 64 rows."""
    q, k, v, bias, row_positions, block_ids, members, counts, out, lse = refs
    (rows_smem, k_smem, v_smem, bias_smem, lse_smem), loaded, used, turn = scoped
    q_loaded, k_loaded, v_loaded = loaded
    warpgroup = lax.axis_index("warpgroup")
    tile, head, row = (lax.axis_index(name) for name in ("tile", "head", "row"))
    full, every = counts[row, head, tile, 0], counts[row, head, tile, 1]
    pairs = (every + 1) // _PAIR

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def entry(list_: Any, index: Any) -> Any:
        return list_[row, head, tile, jnp.clip(index, 0, jnp.maximum(every - 1, 0))]

    @_backend.when(warpgroup < 2)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows, lse_rows = rows_smem.at[warpgroup], lse_smem.at[warpgroup]
        first = (tile * 2 + warpgroup) * tokens
        for i in range(tokens):
            plgpu.copy_gmem_to_smem(
                q.at[row, first + i, head], rows.at[_backend.ds(i * group, group)], q_loaded.at[warpgroup]
            )
        plgpu.barrier_wait(q_loaded.at[warpgroup])
        index = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _BLOCK), 0, layout=plgpu.Layout.WGMMA)
        bit = jnp.max(index, axis=1) // group + warpgroup * tokens

        def selected(at: Any) -> Any:
            """Bits of who selected the block; none beyond the end of the list."""
            return jnp.where(at < every, entry(members, at), 0)

        @_backend.when(pairs > 0)
        def _() -> None:
            plgpu.barrier_wait(k_loaded.at[0])

        _backend.when(warpgroup == 1)(take_turns)

        def visit(causal: bool) -> Any:
            def body(pair: Any, carry: Any) -> Any:
                acc, top, total, chosen = carry
                slot = lax.rem(pair, jnp.array(_STAGES, pair.dtype))
                following = tuple(selected(_PAIR * (pair + 1) + i) for i in range(_PAIR))

                def logits_of(*accs: Any) -> Any:
                    for i, ref in enumerate(accs):
                        plgpu.wgmma(ref, rows, k_smem.at[slot, i].transpose((1, 0)))
                    take_turns()
                    return tuple(ref[...] for ref in accs)

                empty = plgpu.ACC((_ROWS, _BLOCK), jnp.float32)
                logits = list(_backend.run_scoped(logits_of, *(empty,) * _PAIR))
                new_top, is_member = top, []
                if causal:
                    mine = row_positions.at[row, _backend.ds(first * group, _ROWS)]
                    position = plgpu.load(mine, layout=_ROW_VECTOR, optimized=False)
                    token = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _BLOCK), 1, layout=plgpu.Layout.WGMMA)
                for i in range(_PAIR):
                    logits[i] = logits[i] * (scale * LOG2_E)
                    if bias is not None:
                        b = plgpu.load(bias_smem.at[slot, i], layout=_KEY_VECTOR, optimized=False)
                        logits[i] += lax.broadcast_in_dim(b * LOG2_E, logits[i].shape, [1])
                    is_member.append(((jnp.full((_ROWS,), 0, jnp.int32) + chosen[i]) >> bit) & 1 != 0)
                    if causal:
                        start = entry(block_ids, _PAIR * pair + i) * _BLOCK
                        last = jnp.where(is_member[i], position, -1)
                        seen = token + start <= lax.broadcast_in_dim(last, logits[i].shape, [0])
                        logits[i] = jnp.where(seen, logits[i], -jnp.inf)
                    new_top = jnp.maximum(new_top, jnp.where(is_member[i], logits[i].max(axis=1), -LARGE))
                plgpu.barrier_arrive(used[0].at[slot])
                decay = jnp.exp2(top - new_top)
                total *= decay
                weights = []
                for i in range(_PAIR):
                    # Subtracting LARGE gives the rows that did not select this block weight 0.
                    reference = jnp.where(is_member[i], new_top, LARGE)
                    p = jnp.exp2(logits[i] - lax.broadcast_in_dim(reference, logits[i].shape, [0]))
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
            tuple(selected(jnp.int32(i)) for i in range(_PAIR)),
        )
        whole = full // _PAIR
        carry = lax.fori_loop(0, whole, visit(causal=False), carry)
        acc, top, total, _ = lax.fori_loop(whole, pairs, visit(causal=True), carry)
        _backend.when(warpgroup == 0)(take_turns)
        blind = top <= -LARGE  # not `total == 0`: NaN must come out as NaN
        total = jnp.where(blind, 1.0, total)
        acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
        rows[...] = jnp.where(lax.broadcast_in_dim(blind, acc.shape, [0]), 0.0, acc).astype(dtype)
        lse_rows[...] = jnp.where(blind, -jnp.inf, top * LN_2 + jnp.log(total))
        plgpu.commit_smem()
        for i in range(tokens):
            plgpu.copy_smem_to_gmem(rows.at[_backend.ds(i * group, group)], out.at[row, first + i, head])
        plgpu.copy_smem_to_gmem(lse_rows, lse.at[row, head, _backend.ds(first * group, _ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @_backend.when(warpgroup == 2)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @_backend.loop(0, pairs)
        def _(pair: Any) -> None:
            slot = lax.rem(pair, jnp.array(_STAGES, pair.dtype))
            spans = [_backend.ds(entry(block_ids, _PAIR * pair + i) * _BLOCK, _BLOCK) for i in range(_PAIR)]

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


def _unseen_as_zero(v: Float[Array, "B K S D"], lists: triton.Lists) -> Float[Array, "B K S D"]:
    """v with 0 for the tokens that no query sees: they may be unwritten memory, and 0 * NaN is NaN."""
    last = jnp.repeat(_lists.last_seen(lists.table, lists.positions), _BLOCK, axis=-1)[..., : v.shape[2]]
    return jnp.where((jnp.arange(v.shape[2], dtype=jnp.int32) <= last)[..., None], v, 0)


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
    batch, length, heads, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    lists = triton.make_lists(settings, 2 * _ROWS, heads // kv_heads, num_keys, block_ids, positions, first_block)
    keys = triton.pad_keys(k, _unseen_as_zero(v, lists), bias, _BLOCK)
    grouped = triton.group_heads(q, kv_heads, lists.tile)
    padded, group = grouped.shape[1], grouped.shape[3]
    row_positions = jnp.broadcast_to(lists.positions[..., None], (batch, padded, group)).reshape(batch, -1)
    tokens = _ROWS // group

    def block_attention_forward(*refs: Any) -> None:
        if bias is None:
            refs = (*refs[:3], None, *refs[3:])
        tiled: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        memory = (
            plgpu.SMEM((2, _ROWS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((_STAGES, _PAIR, _BLOCK, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((_STAGES, _PAIR, _BLOCK, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((_STAGES, _PAIR, _BLOCK), jnp.float32),
            plgpu.SMEM((2, _ROWS), jnp.float32),
        )
        loaded = (
            plgpu.Barrier(num_arrivals=tokens, num_barriers=2),
            plgpu.Barrier(num_arrivals=_PAIR * (1 if bias is None else 2), num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=_PAIR, num_barriers=_STAGES),
        )
        used = (plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),) * 2

        def run(*scoped: Any) -> None:
            _kernel(refs, scoped, tokens=tokens, group=group, dim=dim, scale=settings.scale, dtype=q.dtype)

        _backend.run_scoped(run, memory, loaded, used, plgpu.Barrier(num_arrivals=2), collective_axes="warpgroup")

    operands = alike([x for x in (grouped, *keys, row_positions, *lists.union) if x is not None])
    axes = axes_of(operands)
    out, lse = plgpu.kernel(
        block_attention_forward,
        out_type=[
            struct(grouped.shape, grouped.dtype, axes),
            struct((batch, kv_heads, padded * group), jnp.float32, axes),
        ],
        grid=(padded // lists.tile, kv_heads, batch),
        grid_names=("tile", "head", "row"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    # JAX forgets what `out_type` says of axes. A result that seemed the same on all devices would have its cotangents
    # summed over them.
    out, lse = varying((out, lse), axes)
    lse = jnp.moveaxis(lse.reshape(batch, kv_heads, padded, group), 1, 2)
    group = heads // kv_heads
    return triton.ungroup_heads(out, length, group), triton.ungroup_heads(lse, length, group)
