"""One-pass backward passes with atomics, against the two passes without them that `block_attention` runs.

    python -m experiments.backward_variants --output experiments/results/backward_variants_h200.json

Two rivals are timed. "query-major": each tile of queries walks its blocks once and adds to dk, dv and dbias by float32
atomics. "key-major": each block walks its queries once and adds to dq by float32 atomics. Both make 5 matrix products
per pair instead of 7, and neither repeats its own bits. Sums are float32; the casts back to bfloat16 that both would
need are not counted.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from experiments import correlated
from experiments.environment import gpu_arguments, save
from experiments.prefill import CONFIG, Table
from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, LOG2_E, per_head
from pallas_kernels._tuning import Launch
from pallas_kernels.block_attention import _lists, triton
from pallas_kernels.block_attention._forward import is_member, load_bias, load_rows
from pallas_kernels.block_attention.xla import Settings

SIZE = CONFIG.block_size
EVERYTHING = slice(None)


def _struct(x: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _causal(logits: Any, token: Any, position: Any) -> Any:
    return jnp.where(token <= position, logits, -jnp.inf)


def query_major(refs: Any, *, tile: int, scale: float) -> None:
    q, k, v, bias, positions, ids, members, counts, dout, lse, delta, _, _, _, dq, dk, dv, dbias = refs
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    rows = tile * group
    queries = _backend.ds(tile_id * tile, tile)
    query, grad, top, delta_row = (load_rows(x, row, queries, head) for x in (q, dout, lse, delta))
    position = per_head(positions[row, queries], group)

    def body(trip: Any, acc: Any) -> Any:
        block, selected = ids[row, head, tile_id, trip], members[row, head, tile_id, trip]
        tokens = _backend.ds(block * SIZE, SIZE)
        keys, values = k[row, head, tokens], v[row, head, tokens]
        token = (block * SIZE + jnp.arange(SIZE, dtype=jnp.int32))[None]
        logits = _backend.dot(query, keys.T) * scale + load_bias(bias, row, head, tokens, 0)
        member = is_member(selected, tile, group)
        shift = jnp.where(member, top, LARGE)[:, None]
        weights = _backend.exp2(_causal(logits, token, position[:, None]) - shift, LOG2_E)
        dlogits = weights * (_backend.dot(grad, values.T) - delta_row[:, None])
        low = dlogits.astype(keys.dtype)
        at = (row, head, tokens, EVERYTHING)
        _backend.atomic_add(dk, at, _backend.dot(low.T, query) * scale)
        _backend.atomic_add(dv, at, _backend.dot(weights.astype(grad.dtype).T, grad))
        _backend.atomic_add(dbias, at[:3], jnp.sum(dlogits, axis=0))
        return acc + _backend.dot(low, keys)

    acc = jax.lax.fori_loop(0, counts[row, head, tile_id, 1], body, jnp.zeros((rows, dim), jnp.float32))
    dq[row, queries, head] = (acc * scale).reshape(-1, group, dim).astype(dq.dtype)


def key_major(refs: Any, *, gathered: int, scale: float) -> None:
    q, k, v, bias, positions, listed, block, start, stop, _, dout, lse, delta, _, dk, dv, dbias, dq = refs
    segment, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    at = (row, head, segment)
    own, begin, end = block[at], start[at], stop[at]

    @_backend.when(own >= 0)
    def _() -> None:
        tokens = _backend.ds(own * SIZE, SIZE)
        keys, values = k[row, head, tokens], v[row, head, tokens]
        shift = load_bias(bias, row, head, tokens, 1)
        token = (own * SIZE + jnp.arange(SIZE, dtype=jnp.int32))[:, None]

        def body(trip: Any, carry: Any) -> Any:
            dk_acc, dv_acc, dbias_acc = carry
            entry = begin + trip * gathered + jnp.arange(gathered, dtype=jnp.int32)
            index = listed[row, head, jnp.minimum(entry, end - 1)]
            query, grad, top, delta_row = (load_rows(x, row, index, head) for x in (q, dout, lse, delta))
            valid, position = per_head(entry, group) < end, per_head(positions[row, index], group)
            logits = _causal(_backend.dot(keys, query.T) * scale + shift, token, position[None])
            weights = _backend.exp2(logits - jnp.where(valid, top, LARGE)[None], LOG2_E)
            dlogits = weights * (_backend.dot(values, grad.T) - delta_row[None])
            low = dlogits.astype(query.dtype)
            update = (_backend.dot(low.T, keys) * scale).reshape(gathered, group, dim)
            _backend.atomic_add(dq, (row, index, head, EVERYTHING, EVERYTHING), update)
            dv_acc += _backend.dot(weights.astype(grad.dtype), grad)
            return dk_acc + _backend.dot(low, query), dv_acc, dbias_acc + jnp.sum(dlogits, axis=1)

        zeros = jnp.zeros((SIZE, dim), jnp.float32)
        trips = (end - begin + gathered - 1) // gathered
        carry = (zeros, zeros, jnp.zeros((SIZE,), jnp.float32))
        dk_acc, dv_acc, dbias[at] = jax.lax.fori_loop(0, trips, body, carry)
        dk[at], dv[at] = dk_acc * scale, dv_acc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="length of the row (default: 32768)")
    args = gpu_arguments(parser)
    inputs = correlated.make_inputs(args.tokens)
    settings, kv_heads = Settings(SIZE, inputs.q.shape[-1] ** -0.5), inputs.k.shape[1]
    keys = triton.Keys(inputs.k, inputs.v, inputs.bias)
    ids = jax.jit(lambda inputs: correlated.selection(CONFIG, inputs))(inputs)
    forward = jax.jit(lambda *floats: triton.forward(settings, *floats, ids, inputs.positions, None))
    out, lse, normaliser = forward(*inputs[:4])
    dout = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
    q, *rows = (triton.group_heads(x, kv_heads, 1) for x in (inputs.q, dout, lse, delta))
    group = q.shape[3]
    table = Table()

    residuals = (*inputs[:4], ids, inputs.positions, None, out, normaliser)
    two_passes = jax.jit(lambda residuals, dout: triton.backward(settings, residuals, (dout, jnp.zeros_like(lse))))
    table.add("two passes, lists included", args.tokens, two_passes, residuals, dout)

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys)
    for launch in (Launch(64, 4, 1), Launch(64, 4, 2), Launch(128, 8, 2)):
        tile = launch.rows // group
        lists = triton.make_lists(settings, launch.rows, group, args.tokens, ids, inputs.positions, None)

        def by_query(*operands: Any, tile: int = tile, launch: Launch = launch) -> Any:
            def kernel(*refs: Any) -> None:
                query_major(refs, tile=tile, scale=settings.scale)

            return _backend.triton_call(
                kernel,
                name="query_major",
                grid=(args.tokens // tile, kv_heads, 1),
                out_shape=(_struct(q), *(_struct(x, jnp.float32) for x in keys)),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                aliases={11 + i: 1 + i for i in range(3)},
            )(*operands, *(x + 0 for x in sums))

        table.add(
            f"query-major, atomics on dk and dv, {launch}",
            args.tokens,
            jax.jit(by_query),
            q,
            *keys,
            inputs.positions,
            *lists.visits,
            *rows,
        )

    bits = _lists.bit_table(ids, inputs.positions, None, num_blocks=args.tokens // SIZE, block_size=SIZE)
    segments = _lists.segments(bits, entries=args.tokens * ids.shape[-1], length=triton.SEGMENT, block_size=SIZE)
    count = segments.block.shape[-1]
    parts = jax.ShapeDtypeStruct((1, kv_heads, count, SIZE, q.shape[-1]), jnp.float32)
    for launch in (Launch(64, 4, 1), Launch(64, 4, 2)):

        def by_key(*operands: Any, launch: Launch = launch) -> Any:
            def kernel(*refs: Any) -> None:
                key_major(refs, gathered=launch.rows // group, scale=settings.scale)

            return _backend.triton_call(
                kernel,
                name="key_major",
                grid=(count, kv_heads, 1),
                out_shape=(parts, parts, jax.ShapeDtypeStruct(parts.shape[:-1], jnp.float32), _struct(q, jnp.float32)),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                aliases={13: 3},
            )(*operands, jnp.zeros(q.shape, jnp.float32))

        table.add(
            f"key-major, atomics on dq, {launch}",
            args.tokens,
            jax.jit(by_key),
            q,
            *keys,
            inputs.positions,
            *segments[:-1],
            *rows,
        )
    save(args.output, entries=table.entries)


if __name__ == "__main__":
    main()
