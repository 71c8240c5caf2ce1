"""The gate without a GPU for decoding: every kernel of a step, and of prompts on their way to the host store."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from lowering import SHAPES, Shape, kernels
from targets import H200

import nosa_jax
from nosa_jax import CacheConfig, NosaLM, presets
from pallas_kernels import (
    Chunks,
    Exact,
    Factors,
    Projected,
    Residence,
    Selectable,
    Sizes,
    Store,
    Summaries,
    Token,
    append_and_select,
    append_token,
    blocks,
    decode_attention,
    fetch_blocks,
    rebuilt_attention,
    resolve_slots,
    rms_norm,
    update_and_attend,
    write_back_blocks,
)


@pytest.fixture(params=["tiny_float32", "nosa_1b", "nosa_8b_long", "group_of_3"])
def decoding(request) -> Shape:
    return SHAPES[request.param]


def decode_arguments(shape, slots=80):
    """Arguments by name of a decode step: two layers, two rows."""
    kv_heads, group, dim, tokens, dtype, attention = shape
    size, selected = attention.block_size, attention.num_selected_blocks
    m = max(selected, blocks.num_blocks(tokens, size))
    row = lambda dtype, *sizes: jax.ShapeDtypeStruct((2, *sizes), dtype)
    cache = lambda dtype, *sizes: jax.ShapeDtypeStruct((2, 2, kv_heads, *sizes), dtype)
    return {
        "q": row(dtype, kv_heads * group, dim),
        "qkv": row(dtype, kv_heads, group + 2, dim),
        "cos": row("float32", dim // 2),
        "scale": jax.ShapeDtypeStruct((2, kv_heads), "float32"),
        "delta": jax.ShapeDtypeStruct((2, kv_heads, dim, kv_heads), "float32"),
        "k": row(dtype, kv_heads, dim),
        "v": row(dtype, kv_heads, dim),
        "pool": cache(dtype, slots, 2, size, dim),
        "host": jax.ShapeDtypeStruct((2, 2 * m, kv_heads, 2, size, dim), dtype),
        "pages": row("int32", m),
        "bias": cache("float32", m, size),
        "table": cache("int32", slots),
        "pooled": cache(dtype, blocks.num_windows(m * size, attention.pooling_stride), dim),
        "sums": cache("float32", 2, dim),
        "ids": row("int32", kv_heads, selected),
        "all_ids": cache("int32", selected),
        "positions": row("int32"),
        "layer": jax.ShapeDtypeStruct((), "int32"),
    }


def in_host_memory(op, place):
    """`op` with the argument at `place` taken from pinned host memory."""

    def call(*arguments):
        host = jax.device_put(arguments[place], jax.memory.Space.Host)
        return op(*arguments[:place], host, *arguments[place + 1 :])

    return call


def decode_kernels(shape, op, *names, **static):
    given = decode_arguments(shape)
    call = functools.partial(op, **static)
    if "host" in names:
        call = in_host_memory(call, names.index("host"))
    return kernels(call, *(given[name] for name in names))


def test_decode_attention(decoding):
    names = ("q", "pool", "bias", "ids", "ids", "positions", "layer")
    assert decode_kernels(decoding, decode_attention, *names) == ["decode_attention", "decode_attention_sum"]


def test_update_and_attend(decoding):
    def step(q, k, v, pool, host, pages, bias, ids, positions, layer):
        store = Store(pool, host, pages, bias)
        return update_and_attend(Token(q, k, v), store, Residence(ids, ids, ids), positions, layer)

    names = ("q", "k", "v", "pool", "host", "pages", "bias", "ids", "positions", "layer")
    assert decode_kernels(decoding, step, *names) == ["update_and_attend", "decode_attention_sum"]


@pytest.mark.parametrize("chunk, rank, dtype", [(8, 40, "bfloat16"), (20, 160, "float32")])
def test_rebuilt_attention(chunk, rank, dtype):
    """At the shape of the 8B model; chunks and ranks may have any size."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    factors = Factors(
        of(dtype, 2, 2, 800, chunk, rank), of(dtype, 2, 2, 2, rank, 128), *(of("float32", 800 * chunk, 64),) * 2
    )
    chunks = Chunks(of(dtype, 2, 2, 2, 384, 1, chunk, 128), *(of("int32", 2, 2, 384),) * 2)
    exact = Exact(of(dtype, 2, 2, 2, 2, 1096, 128), of("int32", 2))
    operands = (of(dtype, 2, 32, 128), factors, chunks, exact, of("int32"))
    assert kernels(rebuilt_attention, *operands) == ["rebuilt_attention", "decode_attention_sum"]


def test_transport(decoding):
    assert decode_kernels(decoding, fetch_blocks, "pool", "host", "pages", "ids", "ids", "layer") == ["fetch_blocks"]
    assert decode_kernels(decoding, write_back_blocks, "host", "pool", "pages", "all_ids", "all_ids") == [
        "write_back_blocks"
    ]


def test_the_rest_of_a_decode_step(decoding):
    size, stride = decoding.attention.block_size, decoding.attention.pooling_stride
    names = ("table", "table", "ids", "positions", "layer")
    assert decode_kernels(decoding, resolve_slots, *names) == ["resolve_slots"]

    def append(qkv, cos, scale, delta, pooled, sums, bias, positions, layer):
        summaries = Summaries((pooled, sums), bias, (sums[..., :1], sums[..., :1]))
        return append_token(qkv, cos, cos, scale, delta, summaries, positions, layer, stride=stride)

    names = ("qkv", "cos", "scale", "delta", "pooled", "sums", "bias", "positions", "layer")
    assert decode_kernels(decoding, append, *names) == ["append_token"]

    def select(qkv, cos, scale, delta, pooled, sums, bias, held, used, forced, positions, layer):
        windows = pooled.shape[3]
        summaries = Summaries((pooled, sums), bias, (jnp.zeros((*sums.shape[:3], windows, 1)), sums[..., :1]))
        kept = Selectable(summaries, scale, delta, (held, used))
        attention, num_blocks = decoding.attention, bias.shape[3]
        sizes = Sizes(
            num_blocks, size, stride, attention.num_selected_blocks, attention.num_sink_blocks,
            attention.num_local_blocks, attention.num_query_blocks,
        )  # fmt: skip
        return append_and_select(Projected(qkv, cos, cos), kept, positions, layer, forced, sizes=sizes)

    names = (
        "qkv", "cos", "scale", "delta", "pooled", "sums", "bias", "table", "table", "all_ids", "positions", "layer",
    )  # fmt: skip
    expected = ["append_and_weigh", "keys_of_blocks", "select_and_resolve"]
    assert decode_kernels(decoding, select, *names) == expected

    norm = functools.partial(rms_norm, eps=1e-5)
    weight = jax.ShapeDtypeStruct((2, 4096), decoding.dtype)
    layer = decode_arguments(decoding)["layer"]
    assert kernels(norm, jax.ShapeDtypeStruct((2, 4096), decoding.dtype), weight, layer) == ["rms_norm"]


def test_weakly_typed_numbers():
    """As a loop's own index makes them."""
    given = decode_arguments(SHAPES["nosa_8b"])

    def attend(q, pool, ids, layer):
        body = lambda step, out: decode_attention(out, pool, None, ids, ids, jnp.full((2,), step), layer)
        return jax.lax.fori_loop(0, 4, body, q)

    expected = ["decode_attention", "decode_attention_sum"]
    assert kernels(attend, *(given[name] for name in ("q", "pool", "ids", "layer"))) == expected


def test_prompts_reach_the_host_store_by_kernels_alone():
    """XLA would write what is not whole rows two bytes at a time."""
    config, rows, room = presets.tiny(), 3, 400
    model = jax.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((rows, 64), jnp.int32)

    def read(model, tokens):
        state, _ = nosa_jax.prefill(model, tokens, max_length=room, cache=CacheConfig(slots=8))
        return nosa_jax.extend(model, state, tokens)

    with jax.sharding.use_abstract_mesh(H200):
        text = jax.jit(read).trace(model, tokens).lower(lowering_platforms=("cuda",)).as_text()
    store = f"tensor<4x{rows * room // 16}x2x2x16x32xbf16>"
    users = [line for line in text.splitlines() if store in line]
    assert any('name = "write_back_blocks"' in line for line in users)
    assert any('name = "fetch_blocks"' in line for line in users)
    assert not any(
        operation in line for line in users for operation in (".dynamic_update_slice", ".scatter", ".select")
    )
