"""What has to hold on a GPU as on a CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    OFFSETS,
    assert_as_good,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    fuzzed_ids,
    in_bfloat16,
    in_float64,
    no_lse_of_empty,
    of_case,
    poisoned,
    rounded_weights,
    true_gradients,
    value_and_gradients,
    with_exact_products,
)
from jax.sharding import NamedSharding, PartitionSpec
from scores_checks import definition
from selection_checks import counts
from support import lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig, ModelConfig, cast
from nosa_jax.cache import host_store
from pallas_kernels import (
    _inputs,
    append_and_select,
    append_token,
    block_attention,
    block_scores,
    blocks,
    decode_attention,
    fetch_blocks,
    resolve_slots,
    rms_norm,
    select_blocks,
    update_and_attend,
    write_back_blocks,
)
from pallas_kernels.append_and_select import cases as select_cases
from pallas_kernels.append_token import cases as append_cases
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.block_attention.cases import Case
from pallas_kernels.block_attention.reference import block_attention_ref
from pallas_kernels.block_scores import cases as score_cases
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.resolve_slots import cases as slot_cases
from pallas_kernels.resolve_slots import reference as slot_reference
from pallas_kernels.rms_norm import cases as norm_cases

pytestmark = pytest.mark.gpu


def test_offloaded_decoding_is_bit_identical():
    model = lively_model(small_config())
    tokens, lengths = random_tokens(3, 300, seed=2), np.array([300, 128, 33])
    runs = [
        nosa_jax.generate(model, tokens, lengths, max_new_tokens=50, cache=cache, record=True)
        for cache in (CacheConfig(offload=False), CacheConfig(slots=8), CacheConfig(slots=12))
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.logits, runs[0].logits)


def test_memory_kinds():
    model = lively_model(small_config())
    prefill = jax.jit(nosa_jax.prefill, static_argnames="max_length")
    state, _ = prefill(model, random_tokens(1, 40), max_length=200)
    assert state.host.sharding.memory_kind == "pinned_host"
    assert state.pool.sharding.memory_kind == "device"


# ---- kernels. Compiling takes seconds, so that each compiled function checks all it can ----


def rows_of(kv_heads, group, dim, *rows, **settings):
    return _inputs.Rows(
        rows, kv_heads, group, dim, num_selected_blocks=8, num_local_blocks=2, num_query_blocks=2, **settings
    )


ROWS = {
    "g1": rows_of(2, 1, 64, (63, 100, 205), (700,)),
    "g4_ragged": rows_of(1, 4, 64, (63,), (100,), (205,), (2000,), (4097,)),
    "g8_packed": rows_of(2, 8, 128, (1000, 63), (100, 7, 205)),
    "g16_chunk": rows_of(2, 16, 128, (2000,), (1500,), queries=300),
}


@functools.cache
def attention(implementation):
    return functools.partial(block_attention, implementation=implementation)


def attend(implementation, inputs, cotangents, **size):
    return jax.device_get(value_and_gradients(attention(implementation), inputs, cotangents, **size))


@functools.cache
def attention_case(name, dtype):
    """(clean inputs, cotangents), the same with all that must not matter, truth in float64, static arguments."""
    inputs, cotangents, size = of_case(Case(ROWS[name]))
    clean = inputs, no_lse_of_empty(inputs, cotangents)
    wide = clean
    if dtype == "bfloat16":
        clean, wide = in_bfloat16(*clean)
    inputs, (out, lse) = clean
    padding, nan = inputs["positions"] < 0, np.asarray(np.nan, out.dtype)
    ids = fuzzed_ids(inputs, ROWS[name].num_blocks, **size)
    assert (ids != inputs["block_ids"]).mean() > 0.01
    wild = np.where(padding[..., None, None], nan, out), np.where(padding[..., None], np.nan, lse)
    return clean, (poisoned(inputs, **size) | {"block_ids": ids}, wild), true_gradients(*wide, **size), size


def assert_nothing_else_matters(implementation, clean, dirty, size):
    """Neither NaN nor meaningless ids, to the bit; nor running it again."""
    ours = attend(implementation, *clean, **size)
    assert_same_bits(attend(implementation, *clean, **size), ours)
    assert_same_bits(attend(implementation, *dirty, **size), ours)
    return ours


def test_attention_in_float32():
    clean, dirty, (true_outputs, true), size = attention_case("g4_ragged", "float32")
    (out, lse), grads = assert_nothing_else_matters("triton", clean, dirty, size)
    # Two units in the last place per weight from the GPU's exp2, beside the roundings of logits of a few units.
    assert_close({"out": out} | grads, {"out": true_outputs[0]} | true, 1e-5)
    assert_lse_close(lse, true_outputs[1], 1e-5)


@pytest.mark.parametrize("group, dim", [(4, 64), (16, 128)])
def test_dense_attention_by_cudnn(group, dim):
    """Values, and gradients through the output and through lse at once, as good as their rounding."""
    case = Case(rows_of(2, group, dim, (700,), (700,)), dense=True, biased=False, numbered=False)
    inputs, cotangents, size = of_case(case)
    low, wide = in_bfloat16(inputs, cotangents)
    ours, grads = attend("cudnn", *low, **size)
    (true_out, true_lse), true = in_float64(block_attention_ref, *wide, **size)
    naive, naive_grads = jax.device_get(value_and_gradients(whole_rows_rounded, *low, **size))
    assert_as_good(ours[0], naive[0], true_out)
    assert_lse_close(ours[1], true_lse, 1e-4)
    for name in true:
        assert_as_good(grads[name], naive_grads[name], true[name])


DENSE = {
    # Behind a cache of 2048 tokens, rows of different lengths, then all tokens; the caller's blocks are of 16.
    "chunk": Case(rows_of(2, 16, 128, (2048,), (1500,), queries=300), dense=True, biased=False),
    "whole": Case(rows_of(2, 16, 128, (2048,), (1100,), block_size=16, stride=4), dense=True, biased=False),
    "packed": Case(rows_of(2, 8, 128, (1000, 63), (100, 7, 205, 1300)), dense=True),
    "g3": Case(rows_of(3, 3, 64, (2048,), (700,)), dense=True, biased=False),
    "g4": Case(rows_of(2, 4, 128, (2048,), (700,)), dense=True),
    "d256": Case(rows_of(2, 1, 256, (700,)), dense=True, biased=False),
}


@pytest.mark.parametrize(
    "implementation, name",
    [*(("triton", name) for name in DENSE), *(("mosaic", name) for name in ("chunk", "whole", "packed"))],
)
def test_dense_attention_by_our_kernels(implementation, name):
    """Values and gradients as good as their rounding, NaN where nobody looks, the same bits again; and XLA's values."""
    inputs, cotangents, size = of_case(DENSE[name])
    if name == "chunk":  # padding amid the queries, and unwritten memory behind them
        positions = np.array(inputs["positions"]) - np.array([[130], [700]], np.int32)
        positions[:, 100:103] = -1
        inputs = inputs | {"positions": positions}
    clean, wide = in_bfloat16(inputs, no_lse_of_empty(inputs, cotangents))
    (true_out, true_lse), true = true_gradients(*wide, **size)
    inputs, (out, lse) = clean
    padding, nan = inputs["positions"] < 0, np.asarray(np.nan, out.dtype)
    wild = np.where(padding[..., None, None], nan, out), np.where(padding[..., None], np.nan, lse)
    (ours, our_lse), grads = assert_nothing_else_matters(implementation, clean, (poisoned(inputs, **size), wild), size)
    (naive_out, _), naive = jax.device_get(value_and_gradients(rounded_weights, *clean, **size))
    assert_as_good(ours, naive_out, true_out)
    assert_lse_close(our_lse, true_lse, 1e-5)
    for learned, gradient in grads.items():
        assert_as_good(gradient, naive[learned], true[learned])
    (by_xla, _), _ = attend("xla", *clean, **size)
    assert_as_good(ours, by_xla, true_out)


def test_dense_attention_in_float32():
    inputs, cotangents, size = of_case(Case(rows_of(1, 4, 64, (700,), (205,), queries=300), dense=True))
    cotangents = no_lse_of_empty(inputs, cotangents)
    (out, lse), grads = attend("triton", inputs, cotangents, **size)
    (true_out, true_lse), true = true_gradients(inputs, cotangents, **size)
    assert_close({"out": out} | grads, {"out": true_out} | true, 1e-5)
    assert_lse_close(lse, true_lse, 1e-5)


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
@pytest.mark.parametrize("dense", [True, False])
def test_large_logits_are_as_good_as_by_natural_exponentials(implementation, dense):
    """Forward; weights and outputs are rounded to bfloat16, and what all logits have in common takes nothing away."""
    case = Case(rows_of(2, 16, 128, (2000,), (1500,), queries=300), dense=dense, biased=not dense)
    inputs, cotangents, size = of_case(case)
    for offset in (0, *OFFSETS):
        (low, _), (wide, _) = in_bfloat16(with_exact_products(inputs, offset), no_lse_of_empty(inputs, cotangents))
        (true_out, _), _ = true_gradients(wide, cotangents, **size)
        (naive_out, _), _ = jax.device_get(value_and_gradients(rounded_weights, low, cotangents, **size))
        (out, _), _ = attend(implementation, low, cotangents, **size)
        assert_as_good(out, naive_out, true_out)


def whole_rows_rounded(**inputs):
    batch, length = inputs["q"].shape[:2]
    return rounded_weights(**inputs | {"positions": blocks.whole_rows(batch, length)})


@pytest.mark.parametrize(
    "implementation, name",
    [
        ("triton", "g1"), ("triton", "g4_ragged"), ("triton", "g8_packed"), ("triton", "g16_chunk"),
        ("mosaic", "g8_packed"), ("mosaic", "g16_chunk"),
    ],
)  # fmt: skip
def test_attention_in_bfloat16_is_as_good_as_its_rounding(implementation, name):
    clean, dirty, ((true_out, true_lse), true), size = attention_case(name, "bfloat16")
    (out, lse), grads = assert_nothing_else_matters(implementation, clean, dirty, size)
    (naive_out, _), naive = jax.device_get(value_and_gradients(rounded_weights, *clean, **size))
    assert_as_good(out, naive_out, true_out)
    assert_lse_close(lse, true_lse, 1e-5)
    for learned, gradient in grads.items():
        assert_as_good(gradient, naive[learned], true[learned])


@functools.partial(jax.jit, static_argnames=("implementation", "num_blocks", "block_size", "stride"))
def scores_of(inputs, implementation="triton", **options):
    return block_scores(**inputs, **options, implementation=implementation)


@pytest.mark.parametrize("name, dtype", [("g4_ragged", "float32"), ("g8_packed", "bfloat16")])
def test_scores(name, dtype):
    case = ROWS[name]
    inputs, options = score_cases.make_inputs(case, jax.random.key(1)), score_cases.options(case)
    inputs |= {n: inputs[n].astype(dtype) for n in ("q", "pooled_keys")}
    positions = inputs["positions"]
    first = blocks.query_first_blocks(positions, inputs["first_block"], case.block_size)
    windows = inputs["pooled_keys"].shape[2]
    visible = blocks.visible_windows(positions, first, windows, block_size=case.block_size, stride=case.stride)
    dirty = {
        "q": jnp.where((positions >= 0)[..., None, None], inputs["q"], jnp.nan),
        "pooled_keys": jnp.where(visible.any(1)[:, None, :, None], inputs["pooled_keys"], jnp.nan),
    }
    ours, expected = np.asarray(scores_of(inputs, **options)), np.asarray(definition(inputs, **options))
    np.testing.assert_array_equal(scores_of(inputs | dirty, **options), ours)
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected))
    real = np.isfinite(expected)
    np.testing.assert_allclose(ours[real], expected[real], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("num_blocks, kind", [(65, "both"), (2048, "both"), (2048, "query_scores")])
def test_selections_are_those_of_xla(num_blocks, kind):
    """Half of the scores take one of few values: equal ones are decided by the lower id."""
    rng = np.random.default_rng(0)
    length = 300

    def scores(*shape):
        drawn = rng.standard_normal((2, 2, *shape, num_blocks), np.float32)
        ties = np.where(rng.random(drawn.shape) < 0.1, -np.inf, np.round(drawn, 1) + 0.0)
        return np.where(rng.random(drawn.shape) < 0.5, ties, drawn).astype(np.float32)

    inputs = {
        "query_scores": scores(length),
        "importance_scores": scores() if kind == "both" else None,
        "positions": np.sort(rng.integers(-1, 4 * num_blocks, (2, length)), axis=1).astype(np.int32),
        "first_block": np.stack([np.zeros(num_blocks), np.arange(num_blocks) // 50 * 50]).astype(np.int32),
    }
    sizes = counts(70, 1, 17, 15)
    ours, xla = (
        jax.jit(functools.partial(select_blocks, **sizes, implementation=implementation))(**inputs)
        for implementation in ("triton", "xla")
    )
    np.testing.assert_array_equal(ours, xla)


# ---- decoding ----

WILD = np.array([-(2**31), -1, 2**31 - 1], np.int32)


def compiled(op, inputs, implementation="triton", **options):
    run = jax.jit(functools.partial(op, implementation=implementation, **options))
    return jax.tree.map(np.asarray, run(**inputs))


def test_decoding_512_steps_gives_the_same_bits_from_any_cache():
    """Eight rows of different lengths, 64 selected blocks: on the device, few and many slots, both transports."""
    shape = {"num_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 8, "num_kv_heads": 2}
    model = cast(lively_model(ModelConfig(vocab_size=512, head_dim=64, **shape)), jnp.bfloat16)
    lengths = np.array([6500, 6001, 5200, 4500, 4097, 4096, 700, 33])
    tokens = random_tokens(8, lengths.max(), seed=2, vocab=512)
    run = functools.partial(nosa_jax.generate, model, tokens, lengths, max_new_tokens=512, record=True, chunk=1024)
    expected = jax.device_get(run(cache=CacheConfig(offload=False)))
    assert np.isfinite(expected.logits).all()
    caches = [CacheConfig(slots=slots) for slots in (64, 80, 128)] + [CacheConfig(slots=80, transport="device_put")]
    for cache in caches:
        ours = jax.device_get(run(cache=cache))
        np.testing.assert_array_equal(ours.logits, expected.logits)
        assert (ours.fetched > 0).any()


def test_rows_over_all_gpus():
    """Every device gives the bits that one alone gives with its rows."""
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    mesh, rows = jax.make_mesh((len(devices),), ("rows",)), 2
    model = cast(lively_model(small_config()), jnp.bfloat16)
    lengths = np.arange(rows * len(devices)) * 20 + 33
    tokens = random_tokens(len(lengths), lengths.max(), seed=3)
    run = functools.partial(nosa_jax.generate, max_new_tokens=100, cache=CacheConfig(slots=9), record=True)
    shared = run(jax.device_put(model, NamedSharding(mesh, PartitionSpec())), tokens, lengths, mesh=mesh)
    assert shared.tokens.sharding.device_set == set(devices) and (shared.fetched > 0).any()
    for first in range(0, len(lengths), rows):
        part = slice(first, first + rows)
        alone = run(model, tokens[part], lengths[part])
        np.testing.assert_array_equal(shared.logits[part], alone.logits)
        np.testing.assert_array_equal(shared.fetched[:, part], alone.fetched)


def test_transport_above_4_gib():
    """The last blocks of a host store of 5 GB, there and back, beside ids and slots that mean nothing."""
    shape, rng = (2, 2 * 20000, 2, 2, 64, 128), np.random.default_rng(0)
    host = jax.jit(lambda: host_store.allocate(shape, jnp.bfloat16))()
    pool = jnp.asarray(rng.standard_normal((2, 2, 2, 8, *shape[3:]), np.float32), jnp.bfloat16)
    pages = jnp.asarray(rng.permutation(shape[1]).reshape(2, -1), jnp.int32)
    everywhere = lambda *numbers: jnp.broadcast_to(jnp.asarray(numbers, jnp.int32), (2, 2, 2, len(numbers)))
    ids, layer = everywhere(19999, 3, 10007, *WILD, 20000, 5, 6), jnp.int32(1)
    slots = everywhere(0, 1, 2, 3, 3, 3, 3, WILD[0], 8)
    back = everywhere(4, 5, 6, 7, 7, 7, 7, WILD[2], 8)
    write = jax.jit(functools.partial(write_back_blocks, implementation="triton"), donate_argnums=0)
    host = write(host, pool, pages, ids, slots)
    before = np.asarray(pool, np.float32)
    fetch = jax.jit(functools.partial(fetch_blocks, implementation="triton"))
    after = np.array(fetch(pool, host, pages, ids[1], back[1], layer), np.float32)
    np.testing.assert_array_equal(after[1, :, :, 4:7], before[1, :, :, :3])
    after[1, :, :, 4:7] = before[1, :, :, 4:7]
    np.testing.assert_array_equal(after, before)


def test_one_step_of_the_cache():
    """The pool to the bit as XLA composes it, the output to the bit as attention alone."""
    case = decode_cases.Case((5000, 4160, 300), 100, 2, 16, 128, 2, 64, 64, dtype="bfloat16")
    inputs = decode_cases.make_inputs(case, jax.random.key(0))
    given = decode_cases.offloaded(inputs, jax.random.key(1), 0.2)
    ids, slots, loads = (np.array(given[name]) for name in ("block_ids", "slots", "loads"))
    ids[0, :, :3], slots[0, :, 3:6], loads[0, :, 6:9] = WILD, WILD, WILD
    given |= {"block_ids": jnp.asarray(ids), "slots": jnp.asarray(slots), "loads": jnp.asarray(loads)}
    step = decode_cases.arguments(given)
    out, pool = compiled(update_and_attend, step)
    xla_out, xla_pool = compiled(update_and_attend, step, "xla")
    np.testing.assert_array_equal(pool.astype(np.float32), xla_pool.astype(np.float32))
    np.testing.assert_allclose(out.astype(np.float32), xla_out.astype(np.float32), rtol=0.02, atol=0.02)
    alone = {name: given[name] for name in ("q", "bias", "slots", "block_ids", "positions", "layer")}
    np.testing.assert_array_equal(compiled(decode_attention, alone | {"pool": jnp.asarray(pool)}), out)


def test_the_rest_of_a_decode_step():
    """Slots as the Python loop finds them, summaries as XLA's."""
    for case in (slot_cases.REAL["8b_16k"], slot_cases.REAL["8b_16k_chunks_of_8"], slot_cases.SMALL["many_slots"]):
        inputs = slot_cases.make_inputs(case, jax.random.key(0))
        expected = slot_reference.resolve_slots_ref(**on_numpy(inputs))
        for x, y in zip(compiled(resolve_slots, inputs), expected, strict=True):
            np.testing.assert_array_equal(x, y)

    for case in (append_cases.REAL["8b_16k"], append_cases.SMALL["dma"], append_cases.SMALL["nosa"]):
        given = append_cases.make_inputs(case, jax.random.key(1))
        if len(case.positions) == 16:  # windows that end here, and a row without a token
            given["positions"] = jnp.where(jnp.arange(16) == 3, -1, 16383 - 16 * jnp.arange(16, dtype=jnp.int32))
        ours, xla = (
            compiled(append_token, given, implementation, **append_cases.options(case))
            for implementation in ("triton", "xla")
        )
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(xla), strict=True):
            # Both round the same numbers, some of them the other way.
            np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("name", ["8b_16k", "8b_64k_batch_64"])
def test_selection_and_slots_of_a_step(name):
    """What is selected as XLA selects it, but for near ties; the slots of that as the Python loop finds them."""
    case = select_cases.REAL[name]
    given, static = select_cases.make_inputs(case, jax.random.key(0)), select_cases.options(case)
    ours = compiled(append_and_select, given, **static)
    xla = compiled(append_and_select, given, "xla", **static)
    for x, y in zip(jax.tree.leaves(ours[:1]), jax.tree.leaves(xla[:1]), strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=0.01, atol=1e-5)
    ids = np.asarray(ours[2].block_ids)
    assert (ids == np.asarray(xla[2].block_ids)).mean() > 0.97
    again = compiled(append_and_select, given, **static)
    for x, y in zip(jax.tree.leaves(ours[1:]), jax.tree.leaves(again[1:]), strict=True):
        np.testing.assert_array_equal(x.astype(np.float32), y.astype(np.float32))

    selectable, positions = given["selectable"], np.asarray(given["positions"])
    held, last_used = (np.asarray(x) for x in selectable.table)
    expected = slot_reference.resolve_slots_ref(held, last_used, ids, positions, int(given["layer"]))
    found = (*ours[1].table, ours[2].slots)
    for x, y in zip(found, expected, strict=False):
        np.testing.assert_array_equal(x, y)
    own = (positions // 64)[:, None, None]
    starts_now = (positions % 64 == 0)[:, None, None] & (ids == own)
    np.testing.assert_array_equal(ours[2].loads, np.where(starts_now, -1, expected[3]))
    np.testing.assert_array_equal(ours[3], (np.asarray(ours[2].loads) >= 0).sum(-1))


def test_norms_by_one_layers_weights():
    case = norm_cases.REAL["8b"]
    given, static = norm_cases.make_inputs(case, jax.random.key(0)), norm_cases.options(case)
    ours, xla = (np.asarray(compiled(rms_norm, given, name, **static), np.float32) for name in ("triton", "xla"))
    np.testing.assert_allclose(ours, xla, rtol=0.01)
