"""The gate without a GPU: every kernel lowers for CUDA at the presets' shapes, and "auto" takes it there."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support import but_slow
from targets import H200, cudnn_installed

import nosa_jax
from nosa_jax import AttentionConfig, CacheConfig, ModelConfig, NosaLM, presets
from pallas_kernels import (
    Chunks,
    Exact,
    Factors,
    KernelUnsupportedError,
    Projected,
    Residence,
    Selectable,
    Sizes,
    Store,
    Summaries,
    Token,
    append_and_select,
    append_token,
    block_attention,
    block_scores,
    blocks,
    decode_attention,
    fetch_blocks,
    rebuilt_attention,
    resolve_slots,
    rms_norm,
    select_blocks,
    update_and_attend,
    write_back_blocks,
)


class Shape(NamedTuple):
    kv_heads: int = 2
    group: int = 16
    dim: int = 128
    tokens: int = 8192
    dtype: str = "bfloat16"
    attention: AttentionConfig = AttentionConfig()


def of_preset(config: ModelConfig, tokens: int, dtype: str = "bfloat16") -> Shape:
    group = config.num_heads // config.num_kv_heads
    return Shape(config.num_kv_heads, group, config.head_dim, tokens, dtype, config.attention)


SHAPES = {
    "tiny": of_preset(presets.tiny(), 1024),
    "tiny_float32": of_preset(presets.tiny(), 1024, "float32"),
    "nosa_1b": of_preset(presets.nosa_1b(), 8192),
    "nosa_3b": of_preset(presets.nosa_3b(), 8192),
    "nosa_8b": of_preset(presets.nosa_8b(), 8192),
    "nosa_8b_long": of_preset(presets.nosa_8b(), 131072),
    "nosa_8b_float32": of_preset(presets.nosa_8b(), 8192, "float32"),
    "nosa_8b_float16": of_preset(presets.nosa_8b(), 8192, "float16"),
    **{f"group_of_{group}": Shape(group=group, dim=64) for group in (1, 3, 4, 8, 16)},
    "one_query": Shape(tokens=1),
    "not_whole_blocks": Shape(group=4, dim=64, tokens=4097),
}


def kernels(function, *arguments) -> list[str]:
    """The kernels that `function` calls when lowered for CUDA: Triton's by name, "mosaic", or cuDNN's by name."""
    with jax.sharding.use_abstract_mesh(H200):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    ours = "block|select|append|resolve|fetch|write|decode|update|rebuilt|keys|rms"
    names = re.findall(rf'custom_call @(mosaic)_gpu|custom_call @__(cudnn\$\w+)|name = "((?:{ours})_\w+)"', text)
    names = ["".join(name) for name in names]
    assert text.count("@__gpu$xla.gpu.triton") == sum(not name.startswith(("mosaic", "cudnn")) for name in names)
    return names


@pytest.fixture(params=SHAPES)
def shape(request) -> Shape:
    return SHAPES[request.param]


COUNTS = ("block_size", "num_selected_blocks", "num_sink_blocks", "num_local_blocks", "num_query_blocks")


def arguments_of(shape):
    """Arguments by name: two packed rows with bias."""
    kv_heads, group, dim, tokens, dtype, attention = shape
    num_blocks = blocks.num_blocks(tokens, attention.block_size)
    windows = blocks.num_windows(tokens, attention.pooling_stride)

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((2, *shape), dtype)

    return {
        "q": of(dtype, tokens, kv_heads * group, dim),
        "k": of(dtype, kv_heads, tokens, dim),
        "bias": of("float32", kv_heads, tokens),
        "block_ids": of("int32", kv_heads, tokens, attention.num_selected_blocks),
        "positions": of("int32", tokens),
        "first_block": of("int32", num_blocks),
        "pooled_keys": of(dtype, kv_heads, windows, dim),
        "query_scores": of("float32", kv_heads, tokens, num_blocks),
        "importance_scores": of("float32", kv_heads, num_blocks),
    }


def attention_kernels(shape, implementation="auto", **changes):
    given = arguments_of(shape) | changes
    learned = [given[name] for name in ("q", "k", "k", "bias")]
    rest = [given[name] for name in ("block_ids", "positions", "first_block")]

    def loss(learned, rest):
        size = shape.attention.block_size
        outputs = block_attention(*learned, *rest, block_size=size, implementation=implementation)
        return sum(x.astype(jnp.float32).sum() for x in outputs)

    return kernels(jax.grad(loss), learned, rest)


def scores_kernels(shape, **changes):
    given, attention = arguments_of(shape) | changes, shape.attention
    sizes = {"block_size": attention.block_size, "stride": attention.pooling_stride}
    num_blocks = given["query_scores"].shape[-1]
    scores = lambda *arguments: block_scores(*arguments, num_blocks=num_blocks, **sizes)
    return kernels(scores, *(given[name] for name in ("q", "pooled_keys", "positions", "first_block")))


def selection_kernels(shape, **changes):
    given = arguments_of(shape) | changes
    counts = {name: getattr(shape.attention, name) for name in COUNTS}
    names = ("query_scores", "importance_scores", "positions", "first_block")
    return kernels(lambda *arguments: select_blocks(*arguments, **counts), *(given[name] for name in names))


FORWARD = ["block_unions", "block_attention_forward"]
BACKWARD = ["block_unions", "block_inversion", "block_attention_dq", "block_attention_dkv", "block_attention_sum"]
# Elsewhere, in float32, with few or small heads or small blocks, there is Triton alone.
HOPPER = ["nosa_1b", "nosa_3b", "nosa_8b", "nosa_8b_long", "nosa_8b_float16", "one_query"]


# Those that are like another one of `SHAPES` but for a size or a dtype.
ALIKE = ("tiny", "nosa_3b", "nosa_8b_float16", "nosa_8b_float32", "group_of_4", "group_of_8")


@pytest.mark.parametrize("name", but_slow(SHAPES, *ALIKE))
def test_block_attention(name):
    assert attention_kernels(SHAPES[name], "triton") == FORWARD + BACKWARD


@pytest.mark.parametrize("name", but_slow(HOPPER, "nosa_3b", "nosa_8b_long", "nosa_8b_float16"))
def test_block_attention_on_hopper(name):
    assert attention_kernels(SHAPES[name]) == ["block_unions", "mosaic", *BACKWARD]


@pytest.mark.parametrize(
    "name",
    but_slow(
        sorted(set(SHAPES) - set(HOPPER)),
        "tiny",
        "group_of_1",
        "group_of_4",
        "group_of_8",
        "group_of_16",
        "not_whole_blocks",
    ),
)
def test_block_attention_takes_triton_elsewhere(name):
    assert attention_kernels(SHAPES[name]) == FORWARD + BACKWARD


@pytest.mark.parametrize("name", but_slow(SHAPES, *ALIKE))
def test_block_scores(name):
    assert scores_kernels(SHAPES[name]) == ["block_scores_normaliser", "block_scores"]


def test_select_blocks(shape):
    assert selection_kernels(shape) == ["select_blocks"]


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


def test_arguments_that_may_be_missing():
    shape = SHAPES["nosa_8b"]
    for implementation in ("triton", "mosaic"):
        kernels = attention_kernels(shape, implementation, bias=None, first_block=None)
        assert kernels[1:] == [{"triton": FORWARD[1]}.get(implementation, "mosaic"), *BACKWARD]
    assert len(scores_kernels(shape, first_block=None)) == 2
    assert selection_kernels(shape, query_scores=None) == selection_kernels(shape, importance_scores=None)


def test_inference_has_no_backward_kernels():
    shape = SHAPES["nosa_8b"]
    given, size = arguments_of(shape), shape.attention.block_size
    names = ("q", "k", "k", "bias", "block_ids", "positions")
    attend = lambda *arguments: block_attention(*arguments, block_size=size, implementation="triton")
    assert kernels(attend, *(given[name] for name in names)) == FORWARD


def test_the_gate_sees_what_no_kernel_takes():
    shape = SHAPES["nosa_8b"]._replace(dim=80)
    assert attention_kernels(shape, block_ids=None, first_block=None) == []


# ---- dense attention behind a cache, packed, or with a bias ----

DENSE_BACKWARD = ["block_attention_dq", "block_attention_dkv", "block_attention_sum"]


@pytest.mark.parametrize("changes", [{}, {"bias": None, "first_block": None}])
def test_dense_attention_on_hopper(changes):
    shape, changes = SHAPES["nosa_8b"], {"block_ids": None, **changes}
    assert attention_kernels(shape, **changes) == ["mosaic", *DENSE_BACKWARD]
    assert attention_kernels(shape, "triton", **changes) == [FORWARD[1], *DENSE_BACKWARD]


@pytest.mark.parametrize(
    "name", but_slow(("tiny", "nosa_8b_float32", "group_of_1", "group_of_3", "not_whole_blocks"), "tiny", "group_of_1")
)
def test_dense_attention_takes_triton_elsewhere(name):
    assert attention_kernels(SHAPES[name], block_ids=None) == [FORWARD[1], *DENSE_BACKWARD]


def test_blocks_of_any_size_do_for_dense_attention():
    shape = SHAPES["nosa_8b"]._replace(attention=AttentionConfig(block_size=48, pooling_stride=16))
    assert attention_kernels(shape, block_ids=None, first_block=None)[0] == "mosaic"
    assert attention_kernels(shape, block_ids=None)[0] == FORWARD[1]


# ---- dense attention by cuDNN ----

CUDNN_FORWARD, CUDNN_BACKWARD = "cudnn$fmhaSoftmax", "cudnn$fmhaSoftmaxBackward"


@pytest.fixture
def with_cudnn():
    with cudnn_installed():
        yield


def dense(uses, implementation="auto", dtype="bfloat16", **changes):
    """(kernels, loops) of whole rows without ids; uses: names of the outputs that the caller looks at."""
    given = arguments_of(SHAPES["nosa_8b"]._replace(dtype=dtype)) | changes

    def loss(learned):
        outputs = block_attention(*learned, None, None, None, block_size=64, implementation=implementation)
        return sum(x.astype(jnp.float32).sum() for name, x in zip(("out", "lse"), outputs, strict=True) if name in uses)

    learned = [given[name] for name in ("q", "k", "k")]
    return [(kernels(f, learned), loops(f, learned)) for f in (loss, jax.grad(loss))]


def loops(function, *arguments) -> int:
    """XLA's attention is one over tiles with one over spans in it."""
    with jax.sharding.use_abstract_mesh(H200):
        return str(jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()).count("while")


@pytest.mark.parametrize("implementation", ["auto", "cudnn"])
def test_dense_attention_is_cudnn_alone_where_lse_is_not_used(with_cudnn, implementation):
    forward, gradient = dense(["out"], implementation)
    assert forward == ([CUDNN_FORWARD], 0)
    assert gradient == ([CUDNN_FORWARD, CUDNN_BACKWARD], 0)


def test_lse_of_dense_attention_comes_from_xla(with_cudnn):
    """Whose gradient JAX would drop if it were cuDNN's own."""
    (only, only_loops), (only_gradient, only_gradient_loops) = dense(["lse"])
    assert only == only_gradient == [] and only_gradient_loops > only_loops > 0
    (both, both_loops), (both_gradient, both_gradient_loops) = dense(["out", "lse"])
    assert both == [CUDNN_FORWARD] and both_gradient == [CUDNN_FORWARD, CUDNN_BACKWARD]
    assert (both_loops, both_gradient_loops) == (only_loops, only_gradient_loops)


def test_dense_attention_under_a_checkpoint(with_cudnn):
    given = arguments_of(SHAPES["nosa_8b"])

    @jax.checkpoint
    def loss(q, k):
        return block_attention(q, k, k, None, None, None, block_size=64)[0].astype(jnp.float32).sum()

    assert kernels(jax.grad(loss), given["q"], given["k"]) == [CUDNN_FORWARD, CUDNN_BACKWARD]
    assert loops(jax.grad(loss), given["q"], given["k"]) == 0


def test_what_cudnn_does_not_take_runs_in_triton(with_cudnn):
    (forward, _), (gradient, _) = dense(["out"], dtype="float32")
    assert forward == [FORWARD[1]] and gradient == [FORWARD[1], *DENSE_BACKWARD]


def test_without_cudnn_dense_attention_takes_our_kernels():
    with cudnn_installed(None):
        (forward, _), (gradient, _) = dense(["out"])
        assert forward == ["mosaic"] and gradient == ["mosaic", *DENSE_BACKWARD]
        with pytest.raises(KernelUnsupportedError, match="'cudnn' cannot run: JAX cannot use cuDNN: cuDNN is not"):
            dense(["out"], "cudnn")


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
