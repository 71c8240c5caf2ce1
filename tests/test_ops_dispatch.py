"""Which implementation runs, and what is said when none can."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_calls import CALLS, CHUNKS, B, C, D, J, K, L, M, N, S, T, call, floats, ints
from targets import H200, cudnn_installed, target

import pallas_kernels as ops
from pallas_kernels import (
    IMPLEMENTATIONS,
    OPS,
    KernelUnsupportedError,
    Op,
    Summaries,
    _backend,
    _dispatch,
)
from pallas_kernels.bench.work import BENCHMARKS
from pallas_kernels.fetch_blocks import implementation_of

FOLDERS = sorted(file.parent.name for file in Path(ops.__file__).parent.glob("*/reference.py"))


def test_every_op_is_known():
    """To this file and to users; it has a benchmark and a reference."""
    modules = (import_module(f"pallas_kernels.{name}.reference") for name in FOLDERS)
    references = {name for module in modules for name in vars(module) if name.endswith("_ref")}
    assert set(CALLS) == set(OPS) == {benchmark.op.name for benchmark in BENCHMARKS.values()}
    assert {f"{name}_ref" for name in OPS} == references
    assert set(OPS) <= set(ops.__all__) and all(callable(getattr(ops, name)) for name in OPS)
    assert all(op.name == name for name, op in OPS.items())


def test_no_two_ops_have_one_name():
    with pytest.raises(AssertionError, match="two ops are called block_attention"):
        _dispatch.register("block_attention", {})


@pytest.mark.parametrize("name", CALLS)
def test_every_op_has_an_implementation_that_runs_anywhere(name):
    op = OPS[name]
    assert op.name == name and "xla" in op.implementations
    assert set(op.implementations) <= set(IMPLEMENTATIONS)
    assert "pallas_call" not in call(name)
    assert "pallas_call" not in call(name, implementation="auto")


@pytest.mark.parametrize("name", CALLS)
def test_a_named_implementation_never_falls_back(name):
    for missing in set(IMPLEMENTATIONS) - set(OPS[name].implementations):
        with pytest.raises(
            KernelUnsupportedError,
            match=rf"^{name}: implementation='{missing}' cannot run: no '{missing}' kernel .*; use 'auto' or 'xla'",
        ):
            call(name, implementation=missing)


@pytest.mark.parametrize("name", CALLS)
def test_unknown_implementations(name):
    with pytest.raises(ValueError, match=r"^implementation: must be 'auto' or one of .*'xla'.*, got 'cuda'"):
        call(name, implementation="cuda")


def test_kernel_unsupported_is_a_not_implemented_error():
    assert issubclass(KernelUnsupportedError, NotImplementedError)


# ---- kernels: where they run, and what they take ----

KERNELS = [name for name in CALLS if "triton" in OPS[name].implementations]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_need_a_gpu(name):
    with pytest.raises(
        KernelUnsupportedError,
        match=rf"^{name}: implementation='triton' cannot run: it needs an NVIDIA GPU, the default device is 'cpu'",
    ):
        call(name, implementation="triton")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_taken_where_they_can_run(name):
    with _backend.interpreted():
        assert "pallas_call" in call(name, implementation="triton")
        assert "pallas_call" in call(name, implementation="auto")
        assert "pallas_call" not in call(name, implementation="xla")
    assert "pallas_call" not in call(name, implementation="auto")


def heads_of(dim):
    return {"q": floats(B, T, N, dim), "k": floats(B, K, S, dim), "v": floats(B, K, S, dim)}


# op, what changes, why the kernel does not take it
UNSUPPORTED = [
    (
        "append_token",
        {"qkv": floats(B, K, N // K + 2, 24), "cos": floats(B, 12), "sin": floats(B, 12), "scale": None, "delta": None}
        | {"summaries": Summaries(None, None, None)},
        "the head dim must be a power of two of at least 2, got 24",
    ),
    (
        "resolve_slots",
        {"blocks": ints(L, B, K, 2000), "last_used": ints(L, B, K, 2000)},
        f"it takes 1 to 1024 blocks and slots, got {J} and 2000",
    ),
    (
        "decode_attention",
        {"pool": floats(L, B, K, J, 2, 8, D), "bias": None},
        "blocks must hold a power of two of at least 16 tokens, got 8",
    ),
    ("decode_attention", {"q": floats(B, N, D).astype(jnp.bfloat16)}, "q and pool must have one dtype"),
    ("rebuilt_attention", {"q": floats(B, N, D).astype(jnp.bfloat16)}, "q, factors.tokens, .* must have one dtype"),
    (
        "rebuilt_attention",
        {"chunks": CHUNKS._replace(ids=ints(B, K, 0), slots=ints(B, K, 0))},
        "chunks.ids holds nothing",
    ),
    (
        "block_attention",
        {"block_ids": None, "block_size": 24, "first_block": ints(B, -(-S // 24))},
        "documents of dense attention must start on multiples of 16 tokens, got blocks of 24",
    ),
    (
        "block_attention",
        {"block_ids": None} | heads_of(80),
        r"the head dim must be a power of two in \[16, 256\], got 80",
    ),
    ("block_attention", {"block_size": 8}, r"block_size must be a power of two in \[16, 1024\], got 8"),
    ("block_attention", {"block_size": 24}, r"block_size must be a power of two in \[16, 1024\], got 24"),
    ("block_attention", heads_of(24), r"the head dim must be a power of two in \[16, 256\], got 24"),
    ("block_attention", heads_of(8), r"the head dim must be a power of two in \[16, 256\], got 8"),
    ("block_attention", heads_of(512), r"the head dim must be a power of two in \[16, 256\], got 512"),
    (
        "block_attention",
        {"k": jnp.zeros((B, K, S, D), jnp.bfloat16)},
        "q, k and v must have one dtype, got float32, bfloat16, float32",
    ),
    ("block_attention", {"block_ids": ints(B, K, T, 0)}, "there is nothing to do"),
    (
        "block_scores",
        {"pooled_keys": jnp.zeros((B, K, C, D), jnp.bfloat16)},
        "q and pooled_keys must have one dtype, got float32 and bfloat16",
    ),
    (
        "block_scores",
        {"block_size": 48, "stride": 16},
        "block_size / stride must be a power of two up to 64, got 48 / 16",
    ),
    (
        "block_scores",
        {"q": floats(B, T, N, 24), "pooled_keys": floats(B, K, C, 24)},
        r"the head dim must be a power of two in \[16, 256\], got 24",
    ),
]


@pytest.mark.parametrize("name, changes, reason", UNSUPPORTED)
def test_arguments_that_no_kernel_takes(name, changes, reason):
    with _backend.interpreted():
        with pytest.raises(KernelUnsupportedError, match=rf"^{name}: implementation='triton' cannot run: {reason}"):
            call(name, implementation="triton", **changes)
        assert "pallas_call" not in call(name, implementation="auto", **changes)


def halves(**shapes):
    return {name: jnp.asarray(np.zeros(shape, jnp.bfloat16)) for name, shape in shapes.items()}


WHOLE = halves(q=(B, S, N, D), k=(B, K, S, D), v=(B, K, S, D)) | {"bias": None, "block_ids": None, "positions": None}
NOT_FOR_CUDNN = [
    ({"block_ids": ints(B, K, S, J)}, "it knows only the causal mask of whole rows, block_ids must be None"),
    ({"bias": floats(B, K, S)}, "it knows only the causal mask of whole rows, bias must be None"),
    ({"first_block": ints(B, M)}, "it knows only the causal mask of whole rows, first_block must be None"),
    ({"positions": ints(B, S)}, "it knows only the causal mask of whole rows, positions must be None"),
    ({"q": floats(B, S, N, D)}, "q must be bfloat16 or float16, got float32"),
    ({"k": floats(B, K, S, D)}, "q, k and v must have one dtype, got bfloat16, float32, bfloat16"),
    (
        halves(q=(B, S, N, 20), k=(B, K, S, 20), v=(B, K, S, 20)),
        "the head dim must be a multiple of 8 up to 128, got 20",
    ),
    (
        halves(q=(B, S, N, 256), k=(B, K, S, 256), v=(B, K, S, 256)),
        "the head dim must be a multiple of 8 up to 128, got 256",
    ),
]


@pytest.mark.parametrize("changes, reason", NOT_FOR_CUDNN)
def test_arguments_that_cudnn_does_not_take(changes, reason):
    with jax.sharding.use_abstract_mesh(H200), cudnn_installed():
        with pytest.raises(KernelUnsupportedError, match=rf"^block_attention: .*'cudnn' cannot run: {reason}"):
            call("block_attention", "cudnn", **WHOLE | changes)
        call("block_attention", "cudnn", **WHOLE)


def test_cudnn_needs_a_gpu():
    with pytest.raises(KernelUnsupportedError, match="'cudnn' cannot run: it needs an NVIDIA GPU, the default device"):
        call("block_attention", "cudnn", **WHOLE)


def test_only_whole_rows_go_without_positions():
    with pytest.raises(ValueError, match=rf"^positions: must be given unless .*, got None with T={T}, S={S}"):
        call("block_attention", positions=None)


@pytest.mark.parametrize("name", ["block_attention", "block_scores"])
def test_no_kernel_takes_float64(name):
    with _backend.interpreted(), jax.enable_x64(True):
        wide = {n: np.zeros(x.shape) for n, x in CALLS[name][0].items() if n in ("q", "k", "v", "pooled_keys")}
        with pytest.raises(KernelUnsupportedError, match=r"q must be bfloat16, float16 or float32, got float64"):
            call(name, implementation="triton", **wide)
        assert "pallas_call" not in call(name, implementation="auto", **wide)


# ---- the choice itself ----


def functions(*names, **unsupported):
    """An op of one argument whose implementations return their own name."""
    return Op("sum_blocks", {name: lambda x, name=name: name for name in names}, unsupported)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    with jax.sharding.use_abstract_mesh(H200):
        yield


def odd(x):
    return f"{x} is odd" if x % 2 else None


def test_auto_takes_the_fastest(on_a_gpu):
    assert functions("xla", "triton", "mosaic")("auto", 1) == "mosaic"
    assert functions("xla", "triton")("auto", 1) == "triton"
    assert functions("xla", "triton", "mosaic", mosaic=odd)("auto", 1) == "triton"
    assert functions("xla", "triton", "mosaic", mosaic=odd)("auto", 2) == "mosaic"


def test_mosaic_kernels_are_for_hopper():
    op = functions("xla", "triton", "mosaic")
    reason = r"cannot run: it needs an NVIDIA Hopper GPU, .*'gpu' \(NVIDIA A100"
    with jax.sharding.use_abstract_mesh(target("NVIDIA A100-SXM4-80GB")):
        assert op("auto", 1) == "triton"
        with pytest.raises(KernelUnsupportedError, match=reason):
            op("mosaic", 1)


def test_a_named_implementation_is_taken(on_a_gpu):
    op, every = functions("xla", "triton", "mosaic"), ["mosaic", "triton", "xla"]
    assert [op(name, 1) for name in every] == [op.pick(name, 1) for name in every] == every


def test_reasons(on_a_gpu):
    op = functions("xla", "triton", triton=odd)
    assert op.reason("xla", 1) is op.unavailable("xla") is None
    assert op.reason("mosaic", 2) == op.unavailable("mosaic") and "no 'mosaic' kernel" in op.unavailable("mosaic")
    assert (op.reason("triton", 1), op.reason("triton", 2), op.unavailable("triton")) == ("1 is odd", None, None)
    refusal = r"^sum_blocks: implementation='triton' cannot run: 1 is odd; use 'auto' or 'xla'$"
    with pytest.raises(KernelUnsupportedError, match=refusal):
        op("triton", 1)


def test_the_device_is_a_reason_too():
    op = functions("xla", "triton", triton=odd)
    assert op.reason("triton", 1) == op.unavailable("triton") and "needs an NVIDIA GPU" in op.unavailable("triton")


def test_the_slow_path_on_a_gpu_warns_once(on_a_gpu):
    slow, fast = functions("xla", "triton", triton=odd), functions("xla", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast("auto", 1) == slow("auto", 2) == "triton"
        assert slow("xla", 1) == "xla"  # asked for by name: no surprise
    with pytest.warns(
        RuntimeWarning,
        match=r"^sum_blocks: no GPU kernel takes this call \(triton: 1 is odd\), running the XLA implementation",
    ) as warned:
        assert slow("auto", 1) == "xla"
    assert "pallas_kernels" not in warned[0].filename
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slow("auto", 1) == "xla"


def test_no_warning_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functions("xla", "triton")("auto", 1) == "xla"


# ---- how blocks cross ----


def test_one_name_for_the_transport():
    """ "device_put" moves blocks so whatever attends; "auto" leaves the choice to `implementation`."""
    assert implementation_of("auto") == "auto"
    assert implementation_of("auto", "triton") == "triton"
    assert implementation_of("device_put") == implementation_of("device_put", "xla") == "xla"
    with _backend.interpreted():
        for name in ("fetch_blocks", "write_back_blocks"):
            assert "pallas_call" in call(name, "auto")
            assert "pallas_call" not in call(name, "auto", transport="device_put")
        mixed = call("update_and_attend", "triton", transport="device_put")
    assert "name=decode_attention" in mixed and "update_and_attend" not in mixed


@pytest.mark.parametrize("name", ["fetch_blocks", "write_back_blocks", "update_and_attend"])
def test_unknown_transports(name):
    with pytest.raises(ValueError, match=r"^transport: must be one of \('auto', 'device_put'\), got 'nvlink'"):
        call(name, transport="nvlink")


@pytest.mark.parametrize("name", ["fetch_blocks", "write_back_blocks"])
def test_a_transport_and_an_implementation_that_disagree(name):
    with pytest.raises(ValueError, match=r"^implementation: must be 'auto' or 'xla' with transport='device_put'"):
        call(name, "triton", transport="device_put")
