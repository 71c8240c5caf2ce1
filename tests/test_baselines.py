"""Rival policies against what their original code gave (see golden/README.md), and rows against themselves alone."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nosa_jax import baselines, rope
from nosa_jax.baselines import shadowkv
from nosa_jax.config import RopeConfig

GOLDEN = Path(__file__).parent / "golden" / "rivals"
STEP = 2.0**-15  # in which golden outputs are kept


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [*rows, D] after RoPE at positions [*#rows]."""
    flat = np.broadcast_to(positions, x.shape[:-1]).reshape(1, -1).astype(np.int32)
    cos, sin = rope.cos_sin(jnp.asarray(flat), RopeConfig(), x.shape[-1], 4096)
    return np.asarray(rope.rotate(jnp.asarray(x).reshape(1, -1, 1, x.shape[-1]), cos, sin)).reshape(x.shape)


def with_heads(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`_post` of every `_pre` of one row."""
    tokens, steps = case["k_pre"].shape[1], len(case["dec_v"])
    decoded = tokens + np.arange(steps)[:, None]
    at = {"k": np.arange(tokens), "q_last": tokens - 1, "dec_q": decoded, "dec_k": decoded}
    return case | {f"{name}_post": rotated(case[f"{name}_pre"], np.asarray(where)) for name, where in at.items()}


@functools.cache
def golden(name: str) -> tuple[dict, dict[str, np.ndarray], baselines.Trace]:
    """(what is expected, the input, what we make of it). Inputs are kept as integers, one KV head of the values."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    inputs = {key: x.astype(np.float32) / facts["grid"] for key, x in arrays.items() if x.dtype == np.int8}
    for key, axis in (("v", 0), ("dec_v", 1)):  # the other KV heads' values decide nothing
        inputs[key] = np.concatenate([inputs[key], *[np.zeros_like(inputs[key])] * (facts["K"] - 1)], axis)
    arrays = {key: x * STEP if key in ("out", "prompt_out") else x for key, x in arrays.items()}
    case = inputs if "k" in inputs else with_heads(inputs)
    policy = getattr(baselines, facts["policy"])(**facts["arguments"])
    return arrays, case, jax.device_get(baselines.replay(policy, case))


def assert_out(ours, theirs) -> None:
    """Far closer than 1e-4, beside the half step that is lost in the file."""
    np.testing.assert_allclose(np.asarray(ours)[..., : theirs.shape[-2], :], theirs, rtol=0, atol=STEP / 2 + 5e-6)


def test_shadowkv_is_the_original():
    """72 generated tokens after 1100, in chunks of 64: 15 before the local part, and 12 tokens are left over."""
    theirs, case, trace = golden("shadowkv_c64_long")
    prompt = trace.prompt
    np.testing.assert_array_equal(prompt.landmarks.outlier_ids[0], theirs["outlier_ids"])
    np.testing.assert_array_equal(prompt.landmarks.ids[0], theirs["landmark_ids"])
    np.testing.assert_allclose(prompt.landmarks.agreement[0], theirs["cosmin"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(prompt.selected[0], theirs["first_ids"])
    np.testing.assert_array_equal(trace.ids, theirs["sel_ids"])
    np.testing.assert_array_equal(trace.new_ids, theirs["new_ids"])
    np.testing.assert_array_equal(trace.attended, theirs["attended"])
    assert_out(trace.out, theirs["out"])

    # The factors are as good as those of an SVD.
    keys = np.moveaxis(case["k_pre"], 0, 1).reshape(1100, -1).astype(np.float64)
    u, s, v = np.linalg.svd(keys, full_matrices=False)
    wanted = (u[:, :22] * s[:22]) @ v[:22]
    ours = np.einsum("tr,krd->tkd", prompt.token_factors[0], prompt.head_factors[0]).reshape(1100, -1)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["arkvale_p16_g4", pytest.param("arkvale_grow", marks=pytest.mark.slow)])
def test_arkvale_is_the_original(name):
    """Pages 16 of 38 are on the device; or all of them do not fit only after 24 steps."""
    theirs, _, trace = golden(name)
    assert_same_sets(trace.prompt.resident[0], theirs["prefill_resident"][0])
    np.testing.assert_array_equal(trace.ids, theirs["top_ids"])
    np.testing.assert_array_equal(trace.new_ids, theirs["recalled"])
    for ours, wanted in zip(trace.attended, theirs["attended"], strict=True):  # slots may be in another order
        assert_same_sets(ours[0], wanted[0])
    assert_out(trace.out, theirs["out"])


def test_infllm_is_the_original():
    """A prompt of 700 tokens in pieces of 64, then 40 steps."""
    theirs, _, trace = golden("infllm_b32_g4")
    for ours, wanted in ((trace.prompt, theirs["lru_after_prefill"]), (trace.last, theirs["cached_after"][-1])):
        used = ours.last_used[0]
        np.testing.assert_array_equal(np.stack([np.flatnonzero(used), used[used > 0]], 1), wanted)
    np.testing.assert_array_equal(trace.ids, theirs["sel_ids"])
    np.testing.assert_array_equal(trace.new_ids, theirs["new_ids"])
    np.testing.assert_array_equal(trace.attended, theirs["attended"])
    assert_out(trace.out, theirs["out"])
    assert_out(trace.prompt_out[theirs["prompt_rows"]], theirs["prompt_out"])


def assert_same_sets(ours, theirs) -> None:
    np.testing.assert_array_equal(np.sort(ours[ours >= 0]), np.sort(theirs[theirs >= 0]))


# Rows of one batch, and policies small enough that all but the last two rows have to choose.
LENGTHS = np.array([150, 149, 144, 121, 96, 80, 10, 1])
STEPS = 20
POLICIES = {
    "ShadowKV": baselines.ShadowKV(chunk=8, rank=12, budget=24, local_chunks=2, outlier_chunks=2),
    "ArkVale": baselines.ArkVale(page=8, budget=10, page_topks=8, sink=1, window=3),
    "InfLLM": baselines.InfLLM(block=8, n_init=8, n_local=32, topk=3, max_cached=4, exc=16, rep=2),
}


def ragged(policy: str) -> dict[str, np.ndarray]:
    """A case of eight rows; NaN behind their lengths."""
    draw = np.random.default_rng(1).standard_normal
    prompt = lambda heads: draw((8, heads, LENGTHS.max(), 16)).astype(np.float32)
    steps = lambda heads: draw((8, STEPS, heads, 16)).astype(np.float32)
    case = {"q": prompt(6), "k": prompt(2), "v": prompt(2), "dec_q": steps(6), "dec_k": steps(2), "dec_v": steps(2)}
    for name in ("q", "k", "v"):
        case[name][np.broadcast_to((np.arange(150) >= LENGTHS[:, None])[:, None], case[name].shape[:3])] = np.nan
    if policy == "InfLLM":
        return case
    last = case["q"][np.arange(8), :, LENGTHS - 1]
    decoded = {"dec_q_post": case["dec_q"], "dec_k_post": case["dec_k"], "dec_v": case["dec_v"]}
    return decoded | {"k_pre": case["k"][..., ::-1], "k_post": case["k"], "v": case["v"], "q_last_post": last}


def margins(policy: str, trace: baselines.Trace) -> np.ndarray:
    """[B, steps, ...]: by how much the worst wanted unit beats the best that is not; inf without a choice."""
    scores, ids = trace.scores, trace.ids
    units = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    may = scores != 0  # of what is not there
    if policy == "ShadowKV":
        units = np.broadcast_to(trace.prompt.landmarks.ids[:, None], scores.shape)
    if policy == "ArkVale":
        page = (LENGTHS[:, None] + np.arange(STEPS))[..., None, None] // 8
        may = (units >= 1) & (units <= page - 3) & (page >= 10)
    wanted = may & (units[..., None] == ids[..., None, :]).any(-1)
    worst = np.where(wanted, scores, np.inf).min(-1)
    return worst - np.where(may & ~wanted, scores, -np.inf).max(-1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_of_a_batch_is_what_it_is_alone(policy):
    case = ragged(policy)
    batch = jax.device_get(baselines.replay(POLICIES[policy], case, lengths=LENGTHS))
    decided = margins(policy, batch)
    assert np.isfinite(decided[:6, -1]).all() and not np.isfinite(decided[6:]).any()
    assert decided.min() > 1e-6  # so that nothing has to be left out below
    for row, length in enumerate(LENGTHS):
        one = {name: array[row : row + 1] for name, array in case.items()}
        alone = jax.device_get(baselines.replay(POLICIES[policy], one, lengths=[length]))
        for name in ("ids", "new_ids"):
            np.testing.assert_array_equal(getattr(batch, name)[row], getattr(alone, name)[0], err_msg=name)
        for ours, wanted in zip(batch.attended[row], alone.attended[0], strict=True):
            np.testing.assert_array_equal(ours[..., : wanted.shape[-1]], wanted)
            assert (ours[..., wanted.shape[-1] :] == -1).all()
        np.testing.assert_allclose(batch.out[row], alone.out[0], rtol=0, atol=2e-6)
        if batch.prompt_out is not None:
            np.testing.assert_allclose(batch.prompt_out[row], alone.prompt_out[0], rtol=0, atol=2e-6)
    # A row whose tokens are all near is attended to as a whole.
    keys, values, queries = dense_inputs(policy, case, row=6)
    for step in range(STEPS):
        now = 11 + step
        logits = np.einsum("kgd,ksd->kgs", queries[step].reshape(2, 3, 16), keys[:, :now]) / 4
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("kgs,ksd->kgd", weights / weights.sum(-1, keepdims=True), values[:, :now]).reshape(6, 16)
        np.testing.assert_allclose(batch.out[6, step], out, rtol=0, atol=2e-6)


def dense_inputs(policy: str, case: dict[str, np.ndarray], row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values [K, tokens, D] and queries [steps, N, D] of a row as dense attention reads them."""
    post = "" if policy == "InfLLM" else "_post"
    length = LENGTHS[row]
    whole = lambda x, new: np.concatenate([x[row, :, :length], np.moveaxis(new[row], 0, 1)], 1)
    keys, values = whole(case[f"k{post}"], case[f"dec_k{post}"]), whole(case["v"], case["dec_v"])
    queries = case[f"dec_q{post}"][row]
    if policy == "InfLLM":
        keys = rotated(keys, np.arange(keys.shape[1]))
        queries = rotated(queries, length + np.arange(STEPS)[:, None])
    return keys, values, queries


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_room_behind_a_row_changes_nothing(policy, dtype):
    """A row as it stands, without an axis B, and in a batch with room behind it; also in 16 bits."""
    case = {name: array.astype(dtype) for name, array in ragged(policy).items()}
    batch = jax.device_get(baselines.replay(POLICIES[policy], case, lengths=LENGTHS))
    length = LENGTHS[3]
    cut = lambda name, x: x[3, :, :length] if name in ("k_pre", "k_post", "v", "q", "k") else x[3]
    alone = jax.device_get(baselines.replay(POLICIES[policy], {name: cut(name, x) for name, x in case.items()}))
    assert alone.out.dtype == dtype and alone.scores.dtype == np.float32
    np.testing.assert_array_equal(batch.ids[3], alone.ids)
    np.testing.assert_array_equal(batch.new_ids[3], alone.new_ids)
    atol = 2e-6 if dtype == np.float32 else 2e-2
    np.testing.assert_allclose(batch.out[3].astype(np.float32), alone.out.astype(np.float32), rtol=0, atol=atol)


def replayed(policy=None, lengths=None, **changes):
    policy = policy or POLICIES["ShadowKV"]
    case = {name: array[0] for name, array in ragged(type(policy).__name__).items()}
    case = {name: array for name, array in (case | changes).items() if array is not None}
    return lambda: baselines.replay(policy, case, lengths=lengths)


def batch_of(lengths):
    return lambda: baselines.replay(POLICIES["ShadowKV"], ragged("ShadowKV"), lengths=lengths)


# name: (call, what the message must say: argument, rule, value, remedy)
BAD = {
    "no chunk": (lambda: baselines.ShadowKV(chunk=0), "ShadowKV.chunk", ">= 1", "0", "Raise it"),
    "a float rank": (lambda: baselines.ShadowKV(rank=4.5), "ShadowKV.rank", "int", "4.5", "whole number"),
    "budget in parts of chunks": (
        lambda: baselines.ShadowKV(budget=100), "ShadowKV.budget", "multiple of chunk = 8", "100", "budget=104"
    ),
    "negative outliers": (lambda: baselines.ShadowKV(outlier_chunks=-1), "outlier_chunks", ">= 0", "-1", "Raise it"),
    "window of one": (lambda: baselines.ArkVale(window=1), "ArkVale.window", ">= 2", "1", "Raise it"),
    "nothing wanted": (lambda: baselines.ArkVale(page_topks=33), "page_topks", "window - 1 = 33", "33", "topks=34"),
    "budget below the wanted": (lambda: baselines.ArkVale(budget=65), "ArkVale.budget", "66 pages", "65", "budget=66"),
    "long pieces": (lambda: baselines.InfLLM(exc=2048), "InfLLM.exc", "n_local = 1024", "2048", "exc=1024"),
    "more representatives than tokens": (lambda: baselines.InfLLM(rep=129), "rep", "block = 128", "129", "rep=128"),
    "small cache": (lambda: baselines.InfLLM(max_cached=31), "max_cached", "topk = 32", "31", "max_cached=32"),
    "no policy": (lambda: baselines.replay("shadowkv", {}), "policy", "one of ShadowKV", "'shadowkv'", "Pass"),
    "no case": (lambda: baselines.replay(POLICIES["InfLLM"], []), "case", "mapping", "list", "Pass a dict"),
    "an array is missing": (replayed(k_pre=None), "case", "must hold k_pre", "dec_v", "Add ['k_pre']"),
    "integers": (replayed(v=np.zeros((2, 150, 16), int)), "case['v']", "floats", "int", "Cast it"),
    "another head dim": (replayed(v=np.zeros((2, 150, 8), np.float32)), "case['v']", "[K, T, D]", "[2, 150, 8]", "it."),
    "heads that do not divide": (
        replayed(q_last_post=np.zeros((5, 16), np.float32), dec_q_post=np.zeros((STEPS, 5, 16), np.float32)),
        "case", "multiple of K", "5 query heads and 2", "Change"
    ),
    "rank beyond the keys": (replayed(baselines.ShadowKV()), "ShadowKV.rank", "K * D = 32", "40", "rank=32"),
    "empty prompt": (
        replayed(**{name: np.zeros((2, 0, 16), np.float32) for name in ("k_pre", "k_post", "v")}),
        "case", "must not be empty", "['T']", "at least one token"
    ),
    "lengths of another batch": (batch_of([3]), "lengths", "must have shape", "[1]", "Reshape"),
    "a length beyond T": (batch_of([151] * 8), "lengths", "[1, T = 150]", "151", "Change them"),
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    call, *parts = BAD[name]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    for part in parts:
        assert part in str(error.value)


def test_ties_go_to_the_lower_chunk():
    landmarks = shadowkv.Landmarks(
        jnp.zeros((1, 1, 5, 8)), jnp.array([[[1, 3, 4, 7, -1]]]), jnp.array([[[0, 2]]]), jnp.zeros((1, 1, 7))
    )
    scores = shadowkv.score(landmarks, jnp.ones((1, 2, 8)))
    np.testing.assert_allclose(scores[0, 0], [0.25] * 4 + [0.0])
    np.testing.assert_array_equal(shadowkv.select(POLICIES["ShadowKV"], landmarks, scores)[0, 0], [1, 3, 4])
