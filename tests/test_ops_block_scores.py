"""Query-aware block scores in XLA: the definition, the published code, chunks, packing, and what must not leak."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scores_checks import assert_close, definition, inputs_of, with_nan

from pallas_kernels import block_scores
from pallas_kernels.block_scores import reference, xla
from pallas_kernels.block_scores.cases import SMALL, options

GOLDEN = Path(__file__).parent / "golden" / "cases"


@functools.partial(jax.jit, static_argnames=("num_blocks", "block_size", "stride"))
def run(inputs, **options):
    return block_scores(**inputs, **options, implementation="xla")


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_reference(name):
    case, inputs = SMALL[name], inputs_of(name)
    scores = np.asarray(run(inputs, **options(case)))
    assert scores.dtype == np.float32
    assert_close(scores, definition(inputs, **options(case)))
    windows = inputs["pooled_keys"].shape[2]
    without = np.arange(case.num_blocks) * (case.block_size // case.stride) > windows  # not even the one to the left
    assert (scores[..., without] == -np.inf).all()
    blind = np.asarray(inputs["positions"]) < 2 * case.stride - 1  # padding, and queries before the first window ends
    scores = np.moveaxis(scores, 2, 1)[blind]
    assert ((scores == 0) | (scores == -np.inf)).all()


@pytest.mark.parametrize("name", ["k1_g8_packed", "k2_g4_ragged"])
def test_nan_stays_with_its_query(name):
    inputs, sizes = inputs_of(name), options(SMALL[name])
    dirty, untouched = with_nan(inputs)
    ours, clean = (np.asarray(run(x, **sizes))[untouched] for x in (dirty, inputs))
    np.testing.assert_array_equal(ours, clean)


def test_bfloat16_takes_float32_sums():
    case = SMALL["k2_g8_chunk"]
    inputs = inputs_of("k2_g8_chunk")
    inputs = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("q", "pooled_keys")}
    scores = run(inputs, **options(case))
    assert scores.dtype == jnp.float32
    assert_close(scores, definition(inputs, **options(case)))


@pytest.mark.parametrize("name, back", [("k2_g4_ragged", 0), ("k1_g16_spans", 0), ("k1_g16_spans", 550)])
def test_one_layer_of_the_cache(name, back):
    """Hundreds of windows and few, seen to the last or only in part; other layers and later windows may hold NaN."""
    case, inputs = SMALL[name], inputs_of(name)
    positions = np.asarray(inputs["positions"])
    inputs["positions"] = jnp.asarray(np.where(positions >= 0, positions - back, -1))
    pooled = np.asarray(inputs["pooled_keys"])
    reached = (np.asarray(inputs["positions"]).max(1) + 1) // case.stride - 1
    written = (np.arange(pooled.shape[2]) < reached[:, None])[:, None, :, None]
    layers = np.full((3, *pooled.shape), np.nan, np.float32)
    layers[1] = np.where(written, pooled, np.nan)
    read = functools.partial(xla.block_scores, first_block=None, layer=jnp.int32(1), **options(case))
    cached = jax.jit(read)(inputs["q"], jnp.asarray(layers), inputs["positions"])
    assert_close(cached, run(inputs, **options(case)))


@pytest.mark.parametrize("chunk", [1, 32, 204])
def test_chunks_of_queries(monkeypatch, chunk):
    """A last chunk that is not full, and one query at a time; packed or not makes no difference to the cutting."""
    case, inputs = SMALL["k2_g4_ragged"], inputs_of("k2_g4_ragged")
    whole = run(inputs, **options(case))
    per_query = 4 * len(case.rows) * case.heads * inputs["pooled_keys"].shape[2]
    monkeypatch.setattr(xla, "_CHUNK_BYTES", chunk * per_query)
    cut = jax.jit(lambda inputs: block_scores(**inputs, **options(case)))(inputs)
    assert_close(cut, whole)


def test_memory_is_bounded_by_a_chunk():
    case, queries = dict(num_blocks=512, block_size=64, stride=16), 8192
    shapes = {"q": (1, queries, 16, 64), "pooled_keys": (1, 2, 2047, 64)}
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    inputs["positions"] = jax.ShapeDtypeStruct((1, queries), jnp.int32)
    temporary = run.lower(inputs, **case).compile().memory_analysis().temp_size_in_bytes
    logits = 4 * queries * 16 * 2047
    assert temporary < logits / 4


@pytest.mark.parametrize("name", ["k1_g8_packed", "k2_g1_packed"])
def test_packed_documents_are_what_they_are_alone(name):
    """Each document's part of the row, moved to the front of a row of its own, with its windows."""
    case, inputs = SMALL[name], jax.tree.map(np.asarray, inputs_of(name))
    scores = np.asarray(run(inputs_of(name), **options(case)))
    places = [(b, *place) for b, row in enumerate(case.rows) for place in case.documents(row)]
    ratio = case.block_size // case.stride

    def alone(x, axis, first, fill=0):
        """x[b, first:] of every document, padded at the end to the full width."""
        width = x.shape[axis]
        x = np.concatenate([x, np.full_like(x, fill)], axis)
        return np.stack(
            [x[b].take(np.arange(f, f + width), axis - 1) for (b, *_), f in zip(places, first, strict=True)]
        )

    starts = np.array([start for _, start, _ in places])
    lengths = np.array([length for _, _, length in places])[:, None]
    place = np.arange(case.tokens, dtype=np.int32)
    rows = {
        "q": alone(inputs["q"], 1, starts),
        "pooled_keys": alone(inputs["pooled_keys"], 2, starts // case.stride, np.nan),
        "positions": np.where(place < lengths, place, -1),
        "first_block": None,
    }
    expected = np.asarray(definition(jax.tree.map(jnp.asarray, rows), **options(case)))
    for row, (b, start, length) in enumerate(places):
        blocks = -(-length // case.block_size)
        first = start // case.block_size
        # Where a row of its own has no window, a packed one may have some of the next document: they count as 0.
        whole = min(blocks, -(-(length // case.stride - 1) // ratio))
        assert_close(scores[b, :, start : start + length, first : first + whole], expected[row, :, :length, :whole])


def test_windows_that_are_not_there_yet_may_hold_nan():
    case, inputs = SMALL["k2_g8_chunk"], inputs_of("k2_g8_chunk")
    visible = (np.asarray(inputs["positions"]).max(1) + 1) // case.stride - 1
    pooled = np.asarray(inputs["pooled_keys"])
    written = np.arange(pooled.shape[2]) < visible[:, None]
    assert not written.all()
    dirty = jnp.asarray(np.where(written[:, None, :, None], pooled, np.nan))
    clean = run(inputs, **options(case))
    np.testing.assert_array_equal(run(inputs | {"pooled_keys": dirty}, **options(case)), clean)


def test_later_windows_leave_earlier_queries_alone_to_the_bit():
    case, inputs = SMALL["k1_g1_one_row"], inputs_of("k1_g1_one_row")
    pooled = inputs["pooled_keys"]
    kept = 100
    changed = np.where((np.arange(pooled.shape[2]) < kept // case.stride - 1)[:, None], pooled, 9.0)
    before, after = (run(inputs | {"pooled_keys": jnp.asarray(x)}, **options(case)) for x in (pooled, changed))
    np.testing.assert_array_equal(before[:, :, :kept], after[:, :, :kept])
    assert (np.asarray(before)[:, :, kept + 4 :] != np.asarray(after)[:, :, kept + 4 :]).any()


def test_large_logits_do_not_overflow():
    case, inputs = SMALL["k1_g4_short"], inputs_of("k1_g4_short")
    inputs = inputs | {"q": inputs["q"] * 1e4}
    scores = np.asarray(run(inputs, **options(case)))
    assert not np.isnan(scores).any() and scores.max() <= case.group + 1e-5
    np.testing.assert_allclose(scores, definition(inputs, **options(case)), rtol=0, atol=1e-2)


def test_no_gradient():
    case, inputs = SMALL["k1_g4_short"], inputs_of("k1_g4_short")

    def loss(q, pooled):
        return block_scores(**(inputs | {"q": q, "pooled_keys": pooled}), **options(case))[..., 0].sum()

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(inputs["q"], inputs["pooled_keys"]):
        assert (np.asarray(gradient) == 0).all()


# ---- against the published code ----


@functools.cache
def golden(name: str):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.partial(jax.jit, static_argnames=("block_size", "stride"))
def window_scores(q, pooled, positions, *, block_size=64, stride=16):
    return reference.window_scores(q, pooled, positions, block_size=block_size, stride=stride)


def test_window_scores_of_every_position():
    arrays = golden("units_ops")
    q, k, out = (arrays[f"stage1_causal_a.{name}"] for name in ("q", "k", "out"))
    positions = jnp.arange(len(q), dtype=jnp.int32)[None]
    ours = np.asarray(window_scores(q[None], k.swapaxes(0, 1)[None], positions))[0]
    np.testing.assert_allclose(ours, out, rtol=0, atol=4e-6)  # sums over 4 heads
    np.testing.assert_array_equal(ours == 0, out == 0)  # the rule of visibility, window by window


def test_window_scores_in_decode_with_groups_of_16():
    arrays = golden("units_ops")
    q, k, cu, out = (arrays[f"stage1_decode.{name}"] for name in ("q", "k", "cu_k", "out"))
    counts = np.diff(cu)
    pooled = np.full((len(q), 2, counts.max(), 128), np.nan, np.float32)
    for b, count in enumerate(counts):
        pooled[b, :, :count] = k[cu[b] : cu[b + 1]].swapaxes(0, 1)
    # Decoding sees every window that exists: the last one has just ended.
    positions = jnp.asarray(16 * (counts + 1) - 1, jnp.int32)[:, None]
    ours = np.asarray(window_scores(q[:, None], pooled, positions))[:, :, 0]
    for b, count in enumerate(counts):
        np.testing.assert_allclose(ours[b, :, :count], out[:, b, :count], rtol=0, atol=1e-5)  # sums over 16 heads
        assert (ours[b, :, count:] == 0).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_of_a_model(layer):
    """From its queries and pooled keys: all window scores, and the block scores where it forced nothing."""
    arrays = golden("g4_red_1500")
    q = jnp.asarray(golden("units_ops")[f"g4_red_1500.L{layer}.q"])
    pooled = jnp.asarray(arrays[f"L{layer}.compressed_k"].swapaxes(0, 1)[None])
    positions = jnp.asarray(arrays["positions"], jnp.int32)
    windows = np.asarray(window_scores(q, pooled, positions))
    theirs = arrays[f"L{layer}.stage1"]
    np.testing.assert_allclose(windows, theirs, rtol=0, atol=4e-6)
    np.testing.assert_array_equal(windows == 0, theirs == 0)

    inputs = {"q": q, "pooled_keys": pooled, "positions": positions, "first_block": None}
    ours = np.asarray(run(inputs, num_blocks=24, block_size=64, stride=16))
    theirs = arrays[f"L{layer}.pool_q"]
    plain = np.isfinite(theirs)
    assert plain.mean() > 0.5
    np.testing.assert_allclose(ours[plain], theirs[plain], rtol=0, atol=4e-6)
