"""Which implementation runs, and what is said when none can or an argument is wrong."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import KernelUnsupportedError, _dispatch
from pallas_kernels._dispatch import PREFERENCE, Op
from pallas_kernels.block_attention.api import BLOCK_ATTENTION
from pallas_kernels.block_scores.api import BLOCK_SCORES
from pallas_kernels.decode_attention.api import DECODE_ATTENTION
from pallas_kernels.fetch_blocks.api import FETCH_BLOCKS, WRITE_BACK_BLOCKS
from pallas_kernels.pooled_keys.api import APPEND_POOLED_KEYS, POOL_KEYS
from pallas_kernels.select_blocks.api import SELECT_BLOCKS

B, T, N, K, S, D, P, M, J, L, C, X = 2, 8, 4, 2, 12, 8, 4, 3, 3, 2, 5, 2
LAYER = jnp.asarray(0, jnp.int32)


def floats(*shape):
    return jnp.zeros(shape, jnp.float32)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


HOST = jax.device_put(floats(L, B, K, M, 2, P, D), jax.memory.Space.Host)

# For each op: its table of implementations, array arguments that are right, static arguments.
CALLS = {
    "block_attention": (
        BLOCK_ATTENTION,
        {
            "q": floats(B, T, N, D), "k": floats(B, K, S, D), "v": floats(B, K, S, D), "bias": floats(B, K, S),
            "block_ids": ints(B, K, T, J), "positions": ints(B, T),
        },
        {"block_size": P},
    ),
    "block_scores": (
        BLOCK_SCORES,
        {"q": floats(B, T, N, D), "pooled_keys": floats(B, K, C, D), "positions": ints(B, T)},
        {"num_blocks": M, "block_size": P, "stride": 2},
    ),
    "select_blocks": (
        SELECT_BLOCKS,
        {"query_scores": floats(B, K, T, M), "importance_scores": floats(B, K, M), "positions": ints(B, T)},
        {"block_size": P, "num_selected_blocks": J, "num_sink_blocks": 1, "num_local_blocks": 1, "num_query_blocks": 1},
    ),
    "pool_keys": (POOL_KEYS, {"keys": floats(B, K, S, D)}, {"stride": 2}),
    "append_pooled_keys": (
        APPEND_POOLED_KEYS,
        {
            "pooled": floats(L, B, K, C, D), "sums": floats(L, B, K, 2, D), "new": floats(B, K, 1, D),
            "start": ints(B), "count": ints(B), "layer": LAYER,
        },
        {"stride": 2},
    ),
    "decode_attention": (
        DECODE_ATTENTION,
        {
            "q": floats(B, N, D), "pool": floats(L, B, K, J, 2, P, D), "bias": floats(L, B, K, M, P),
            "slots": ints(B, K, J), "block_ids": ints(B, K, J), "positions": ints(B), "layer": LAYER,
        },
        {},
    ),
    "fetch_blocks": (
        FETCH_BLOCKS,
        {
            "pool": floats(L, B, K, J, 2, P, D), "host": HOST,
            "block_ids": ints(B, K, X), "slots": ints(B, K, X), "layer": LAYER,
        },
        {},
    ),
    "write_back_blocks": (
        WRITE_BACK_BLOCKS,
        {
            "host": HOST, "pool": floats(L, B, K, J, 2, P, D),
            "block_ids": ints(B, K, X), "slots": ints(B, K, X), "layer": LAYER,
        },
        {},
    ),
}  # fmt: skip


def call(name, implementation="xla", **wrong):
    """The shape of the result; nothing runs."""
    _, arrays, static = CALLS[name]
    run = lambda arrays: getattr(ops, name)(**arrays, **static, implementation=implementation)
    return jax.eval_shape(run, arrays | wrong)


@pytest.mark.parametrize("name", CALLS)
def test_every_op_has_an_implementation_that_runs_anywhere(name):
    op = CALLS[name][0]
    assert op.name == name and "xla" in op.implementations
    assert set(op.implementations) <= set(PREFERENCE)
    call(name)
    call(name, implementation="auto")


@pytest.mark.parametrize("name", CALLS)
def test_a_named_implementation_never_falls_back(name):
    for missing in set(PREFERENCE) - set(CALLS[name][0].implementations):
        with pytest.raises(
            KernelUnsupportedError, match=rf"^{name}: no '{missing}' kernel .* use implementation='xla'"
        ):
            call(name, implementation=missing)


@pytest.mark.parametrize("name", CALLS)
def test_unknown_implementations(name):
    with pytest.raises(ValueError, match=r"^implementation: must be 'auto' or one of .*'xla'.*, got 'cuda'"):
        call(name, implementation="cuda")


def test_kernel_unsupported_is_a_not_implemented_error():
    assert issubclass(KernelUnsupportedError, NotImplementedError)


def functions(*names):
    """An op whose implementations return their own name."""
    return Op("sum_blocks", {name: lambda name=name: name for name in names})


def test_auto_takes_the_fastest():
    assert functions("xla", "triton", "mosaic").pick("auto")() == "mosaic"
    assert functions("xla", "triton").pick("auto")() == "triton"
    assert functions("xla").pick("auto")() == "xla"


def test_a_named_implementation_is_taken():
    op = functions("xla", "triton", "mosaic")
    assert [op.pick(name)() for name in PREFERENCE] == list(PREFERENCE)


def test_reasons():
    op = functions("xla")
    assert op.reason("xla") == "available"
    assert "no 'triton' kernel" in op.reason("triton")


def test_the_slow_path_on_a_gpu_warns_once(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    slow, fast = functions("xla"), functions("xla", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast.pick("auto")() == "triton"
        assert slow.pick("xla")() == "xla"  # asked for by name: no surprise
    with pytest.warns(RuntimeWarning, match="^sum_blocks: no GPU kernel, running the XLA implementation"):
        assert slow.pick("auto")() == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slow.pick("auto")() == "xla"


def test_no_warning_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functions("xla").pick("auto")() == "xla"


# op, argument at fault, its wrong value, the shape it should have
WRONG_SHAPES = [
    ("block_attention", "k", floats(B, K, S, D + 1), "[B, K, S, D]"),
    ("block_attention", "k", floats(B + 1, K, S, D), "[B, K, S, D]"),
    ("block_attention", "v", floats(B, K, S + 1, D), "[B, K, S, D]"),
    ("block_attention", "bias", floats(B, N, S), "[B, K, S]"),
    ("block_attention", "block_ids", ints(B, K, J, T), "[B, K, T, J]"),
    ("block_attention", "block_ids", ints(B, T, J), "[B, K, T, J]"),
    ("block_attention", "positions", ints(T), "[B, T]"),
    ("block_scores", "pooled_keys", floats(B, K, C, D + 1), "[B, K, C, D]"),
    ("block_scores", "positions", ints(B, T + 1), "[B, T]"),
    ("select_blocks", "query_scores", floats(B, K, T + 1, M), "[B, K, T, M]"),
    ("select_blocks", "importance_scores", floats(B, K, M + 1), "[B, K, M]"),
    ("append_pooled_keys", "sums", floats(L, B, K, 1, D), "[L, B, K, 2, D]"),
    ("append_pooled_keys", "new", floats(B, K, D), "[B, K, n, D]"),
    ("decode_attention", "pool", floats(L, B + 1, K, J, 2, P, D), "[L, B, K, slots, 2, P, D]"),
    ("decode_attention", "pool", floats(L, B, K, J, 3, P, D), "[L, B, K, slots, 2, P, D]"),
    ("decode_attention", "bias", floats(L, B, K, M * P), "[L, B, K, M, P]"),
    ("decode_attention", "slots", ints(B, K, J + 1), "[B, K, J]"),
    ("decode_attention", "block_ids", ints(B, J), "[B, K, J]"),
    ("decode_attention", "positions", ints(B, 1), "[B]"),
    ("fetch_blocks", "host", floats(L, B, K, M, 2, P, D + 1), "[L, B, K, M, 2, P, D]"),
    ("fetch_blocks", "block_ids", ints(B, K), "[B, K, X]"),
    ("write_back_blocks", "slots", ints(B, K, X + 1), "[B, K, X]"),
]


@pytest.fixture
def as_users_run(monkeypatch):
    """Our own messages, not those of the type checker that only tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name, argument, wrong, letters", WRONG_SHAPES)
def test_wrong_shapes_name_the_argument(as_users_run, name, argument, wrong, letters):
    with pytest.raises(ValueError) as error:
        call(name, **{argument: wrong})
    message = str(error.value)
    assert message.startswith(f"{argument}: must have shape ")
    rule, got = message.split(", got ")
    assert letters.strip("[]") in rule
    assert ", ".join(map(str, wrong.shape)) in got  # the shape that came


@pytest.mark.parametrize("name", ["block_attention", "block_scores", "decode_attention"])
def test_heads_must_divide(as_users_run, name):
    q = CALLS[name][1]["q"]
    odd = jnp.zeros((*q.shape[:-2], 3, q.shape[-1]), q.dtype)
    with pytest.raises(ValueError, match=r"^q: must have a multiple of K heads, got N=3, K=2"):
        call(name, q=odd)


def test_ids_must_be_integers(as_users_run):
    with pytest.raises(TypeError, match=r"^block_ids: must hold integers, got float32"):
        call("block_attention", block_ids=floats(B, K, T, J))


def test_windows_must_fit_the_blocks():
    with pytest.raises(ValueError, match=r"^num_blocks: must cover every window, got 3 for C=7"):
        call("block_scores", pooled_keys=floats(B, K, 7, D))


@pytest.mark.parametrize("pooled, layer", [(floats(L, B, K, C, D), None), (floats(B, K, C, D), LAYER)])
def test_layer_goes_with_stacked_keys(pooled, layer):
    with pytest.raises(ValueError, match=r"^layer: must be given exactly when pooled_keys has a leading L"):
        call("block_scores", pooled_keys=pooled, layer=layer)


def test_annotations_are_checked_here():
    """The suite runs with the type checker on: an op that takes what its annotation forbids would show."""
    with pytest.raises(jaxtyping.TypeCheckError):
        call("block_attention", positions=jnp.zeros((B, T), jnp.float32))
    assert np.dtype(call("select_blocks").dtype) == np.int32
