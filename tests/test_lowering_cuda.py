"""The gate without a GPU: what reads prompts and trains lowers for CUDA at the presets' shapes by "auto"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from lowering import SHAPES, Shape, kernels
from support import but_slow
from targets import H200, cudnn_installed

from nosa_jax import AttentionConfig
from pallas_kernels import (
    KernelUnsupportedError,
    block_attention,
    block_scores,
    blocks,
    select_blocks,
)


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
