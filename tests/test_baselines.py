"""Rival policies against what their original code gave (see golden/README.md), and rows against themselves alone."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import but_slow

from nosa_jax import baselines, rope
from nosa_jax.baselines import shadowkv
from nosa_jax.config import RopeConfig

GOLDEN = Path(__file__).parent / "golden" / "rivals"
Policy = baselines.ShadowKV | baselines.ArkVale | baselines.InfLLM
STEP = 2.0**-15  # in which golden outputs are kept


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [*rows, D] after RoPE at positions [*#rows]; by NumPy, which compiles nothing."""
    angles = np.asarray(positions, np.float32)[..., None] * rope.inverse_frequencies(RopeConfig(), x.shape[-1], 4096)
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def with_heads(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`_post` of every `_pre` of one row."""
    tokens, steps = case["k_pre"].shape[1], len(case["dec_v"])
    decoded = tokens + np.arange(steps)[:, None]
    at = {"k": np.arange(tokens), "q_last": tokens - 1, "dec_q": decoded, "dec_k": decoded}
    return case | {f"{name}_post": rotated(case[f"{name}_pre"], np.asarray(where)) for name, where in at.items()}


@functools.cache
def golden_input(name: str) -> tuple[Policy, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(policy, input, what is expected). Inputs are kept as integers, and one KV head of the values."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    case = {key: x.astype(np.float32) / facts["grid"] for key, x in arrays.items() if x.dtype == np.int8}
    for key, axis in (("v", 0), ("dec_v", 1)):  # the other KV heads' values decide nothing
        case[key] = np.concatenate([case[key], *[np.zeros_like(case[key])] * (facts["K"] - 1)], axis)
    policy = getattr(baselines, facts["policy"])(**facts["arguments"])
    return policy, case if "k" in case else with_heads(case), arrays | {"out": arrays["out"] * STEP}


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], baselines.Trace]:
    """(what is expected, the input, what we make of it)."""
    policy, case, theirs = golden_input(name)
    return theirs, case, jax.device_get(baselines.replay(policy, case))


def assert_out(ours, theirs) -> None:
    """Far closer than 1e-4, beside the half step that is lost in the file."""
    np.testing.assert_allclose(np.asarray(ours)[..., : theirs.shape[-2], :], theirs, rtol=0, atol=STEP / 2 + 5e-6)


def test_shadowkv_is_the_original():
    """72 generated tokens after 1100, in chunks of 64: 15 before the local part, and 12 tokens are left over."""
    theirs, case, trace = golden("shadowkv_c64_long")
    prompt = trace.prompt
    np.testing.assert_array_equal(prompt.landmarks.outlier_ids[0], theirs["outlier_ids"])
    np.testing.assert_array_equal(prompt.landmarks.ids[0], theirs["landmark_ids"])
    np.testing.assert_array_equal(prompt.held[0], theirs["first_ids"])
    policy, length = golden_input("shadowkv_c64_long")[0], jnp.array([1100])
    _, cosines = shadowkv.agreement(policy, jnp.asarray(case["k_post"])[None], length, theirs["cosmin"].shape[1])
    np.testing.assert_allclose(cosines[0], theirs["cosmin"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(trace.ids, theirs["sel_ids"])
    np.testing.assert_array_equal(trace.new_ids, theirs["new_ids"])
    np.testing.assert_array_equal(trace.attended, theirs["attended"])
    assert_out(trace.out, theirs["out"])

    # The factors are as good as those of an SVD.
    keys = np.moveaxis(case["k_pre"], 0, 1).reshape(1100, -1).astype(np.float64)
    u, s, v = np.linalg.svd(keys, full_matrices=False)
    wanted = (u[:, :22] * s[:22]) @ v[:22]
    left, right = shadowkv.factor_keys(policy, jnp.asarray(case["k_pre"])[None], length)
    ours = np.einsum("tr,krd->tkd", left[0], right[0]).reshape(1100, -1)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", but_slow(["arkvale_p16_g4", "arkvale_grow"], "arkvale_grow"))
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
    prompt_out = trace.prompt_out[theirs["prompt_rows"], :4]
    np.testing.assert_allclose(prompt_out, theirs["prompt_out"], rtol=0, atol=5e-6)


def assert_same_sets(ours, theirs) -> None:
    np.testing.assert_array_equal(np.sort(ours[ours >= 0]), np.sort(theirs[theirs >= 0]))


# Rows of one batch by policy, of the shapes and settings of golden cases, whose programs serve for rows alone. All but
# the last two rows have to choose; those attend to everything. ShadowKV's last but one has fewer chunks than outliers.
RAGGED = {
    "ShadowKV": ("shadowkv_c64_long", np.array([1100, 1099, 1024, 900, 830, 777, 300, 1])),
    "ArkVale": ("arkvale_p16_g4", np.array([600, 599, 592, 480, 400, 300, 100, 1])),
    "InfLLM": ("infllm_b32_g4", np.array([700, 699, 650, 512, 450, 420, 80, 1])),
}
PROMPT = ("k_pre", "k_post", "v", "q", "k")  # have an axis of prompt tokens


def ragged(policy: str) -> tuple[Policy, dict[str, np.ndarray], np.ndarray]:
    """(policy, case of eight rows with NaN behind their lengths, lengths)."""
    name, lengths = RAGGED[policy]
    settings, inputs, _ = golden_input(name)
    draw = np.random.default_rng(3).standard_normal
    case = {key: draw((8, *array.shape)).astype(np.float32) for key, array in inputs.items()}
    for key in case.keys() & PROMPT:
        behind = np.arange(case[key].shape[2]) >= lengths[:, None, None]
        case[key][np.broadcast_to(behind, case[key].shape[:3])] = np.nan
    return settings, case, lengths


def margins(policy: Policy, trace: baselines.Trace, lengths: np.ndarray) -> np.ndarray:
    """[B, steps, ...]: by how much the worst wanted unit beats the best that is not; inf without a choice."""
    scores, ids = trace.scores, trace.ids
    units = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    may = scores != 0  # of what is not there
    if isinstance(policy, baselines.ShadowKV):
        units = np.broadcast_to(trace.prompt.landmarks.ids[:, None], scores.shape)
    if isinstance(policy, baselines.ArkVale):
        page = (lengths[:, None] + np.arange(scores.shape[1]))[..., None, None] // policy.page
        may = (units >= policy.sink) & (units <= page - policy.window) & (page >= policy.budget)
    wanted = may & (units[..., None] == ids[..., None, :]).any(-1)
    worst = np.where(wanted, scores, np.inf).min(-1)
    return worst - np.where(may & ~wanted, scores, -np.inf).max(-1)


@pytest.mark.parametrize("policy", but_slow(RAGGED, "ArkVale", "InfLLM"))
def test_a_row_of_a_batch_is_what_it_is_alone(policy):
    settings, case, lengths = ragged(policy)
    batch = jax.device_get(baselines.replay(settings, case, lengths=lengths))
    decided = margins(settings, batch, lengths)
    assert np.isfinite(decided[:6, -1]).all() and not np.isfinite(decided[6:]).any()
    assert decided.min() > 1e-6  # so that nothing has to be left out below
    assert np.isfinite(batch.out).all()
    for row in range(8):
        one = {name: array[row : row + 1] for name, array in case.items()}
        alone = jax.device_get(baselines.replay(settings, one, lengths=lengths[row : row + 1]))
        for name in ("ids", "new_ids", "attended"):
            ours, wanted = getattr(batch, name)[row], getattr(alone, name)[0]
            short = [(0, 0)] * (wanted.ndim - 1) + [(0, ours.shape[-1] - wanted.shape[-1])]
            wanted = np.pad(wanted, short, constant_values=-1)
            np.testing.assert_array_equal(np.sort(ours), np.sort(wanted), err_msg=name)  # near ones may swap places
        np.testing.assert_allclose(batch.out[row], alone.out[0], rtol=0, atol=5e-6)
        if batch.prompt_out is not None:
            np.testing.assert_allclose(batch.prompt_out[row], alone.prompt_out[0], rtol=0, atol=5e-6)

    # A row whose tokens are all near is attended to as a whole.
    keys, values, queries = dense_inputs(case, 6, lengths[6])
    groups = queries.reshape(len(queries), len(keys), -1, keys.shape[-1])
    for step, group in enumerate(groups):
        now = lengths[6] + step + 1
        logits = np.einsum("kgd,ksd->kgs", group, keys[:, :now]) / np.sqrt(keys.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("kgs,ksd->kgd", weights / weights.sum(-1, keepdims=True), values[:, :now])
        np.testing.assert_allclose(batch.out[6, step], out.reshape(-1, keys.shape[-1]), rtol=0, atol=5e-6)


def dense_inputs(case: dict[str, np.ndarray], row: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values [K, tokens, D] and queries [steps, N, D] of a row as dense attention reads them."""
    post = "" if "k" in case else "_post"
    whole = lambda x, new: np.concatenate([x[row, :, :length], np.moveaxis(new[row], 0, 1)], 1)
    keys, values = whole(case[f"k{post}"], case[f"dec_k{post}"]), whole(case["v"], case["dec_v"])
    queries = case[f"dec_q{post}"][row]
    if "k" in case:
        keys = rotated(keys, np.arange(keys.shape[1]))
        queries = rotated(queries, length + np.arange(len(queries))[:, None])
    return keys, values, queries


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("policy", RAGGED)
def test_room_behind_a_row_changes_nothing(policy, dtype):
    """A row as it stands, without an axis B, and in a batch with room behind it; also in 16 bits."""
    settings, case, lengths = ragged(policy)
    case = {name: array.astype(dtype) for name, array in case.items()}
    batch = jax.device_get(baselines.replay(settings, case, lengths=lengths))
    one = {name: array[3][:, : lengths[3]] if name in PROMPT else array[3] for name, array in case.items()}
    alone = jax.device_get(baselines.replay(settings, one))
    assert alone.out.dtype == dtype and alone.scores.dtype == np.float32
    np.testing.assert_array_equal(np.sort(batch.ids[3]), np.sort(alone.ids))
    np.testing.assert_array_equal(np.sort(batch.new_ids[3]), np.sort(alone.new_ids))
    atol = 5e-6 if dtype == np.float32 else 2e-2
    np.testing.assert_allclose(batch.out[3].astype(np.float32), alone.out.astype(np.float32), rtol=0, atol=atol)


SMALL = baselines.ShadowKV(chunk=8, rank=12, budget=24, local_chunks=2, outlier_chunks=2)
SHAPES = {
    **dict.fromkeys(("k_pre", "k_post", "v"), (2, 150, 16)),
    **dict.fromkeys(("dec_k_post", "dec_v"), (20, 2, 16)),
    "q_last_post": (6, 16),
    "dec_q_post": (20, 6, 16),
}
ZEROS = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def replayed(policy=SMALL, **changes):
    case = {name: array for name, array in (ZEROS | changes).items() if array is not None}
    return lambda: baselines.replay(policy, case)


def batch_of(lengths):
    return lambda: baselines.replay(SMALL, {name: array[None] for name, array in ZEROS.items()}, lengths=lengths)


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
    "no case": (lambda: baselines.replay(baselines.InfLLM(), []), "case", "mapping", "list", "Pass a dict"),
    "an array is missing": (replayed(k_pre=None), "case", "must hold k_pre", "dec_v", "Add ['k_pre']"),
    "integers": (replayed(v=np.zeros((2, 150, 16), int)), "case['v']", "floats", "int", "Cast it"),
    "another head dim": (replayed(v=np.zeros((2, 150, 8), np.float32)), "case['v']", "[K, T, D]", "[2, 150, 8]", "it."),
    "heads that do not divide": (
        replayed(q_last_post=np.zeros((5, 16), np.float32), dec_q_post=np.zeros((20, 5, 16), np.float32)),
        "case", "multiple of K", "5 query heads and 2", "Change"
    ),
    "an odd head dim": (
        lambda: baselines.replay(SMALL, {name: array[..., :15] for name, array in ZEROS.items()}),
        "case", "even head dim", "15", "Pad",
    ),
    "no RopeConfig": (
        lambda: baselines.replay(SMALL, ZEROS, rope_config="yarn"), "rope_config", "RopeConfig", "'yarn'", "Pass"
    ),
    "rank beyond the keys": (replayed(baselines.ShadowKV()), "ShadowKV.rank", "K * D = 32", "40", "rank=32"),
    "empty prompt": (
        replayed(**{name: np.zeros((2, 0, 16), np.float32) for name in ("k_pre", "k_post", "v")}),
        "case", "must not be empty", "['T']", "at least one token"
    ),
    "lengths of another batch": (batch_of([3, 4]), "lengths", "must have shape", "[2]", "Reshape"),
    "a length beyond T": (batch_of([151]), "lengths", "[1, T = 150]", "151", "Change them"),
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
    landmarks = shadowkv.Landmarks(None, jnp.array([[[1, 3, 4, 7, -1]]]), None)
    length = jnp.array([(4 + SMALL.outlier_chunks + SMALL.local_chunks) * SMALL.chunk])
    ids, order = shadowkv.select(SMALL, landmarks, jnp.array([[[0.2, 0.3, 0.2, 0.2, 0.0]]]), length)
    np.testing.assert_array_equal(ids[0, 0], [1, 3, 4])
    np.testing.assert_array_equal(ids[0, 0][order[0, 0]], [3, 1, 4])
