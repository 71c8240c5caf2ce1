"""Policies of the engine: what they compute, whatever lies in host memory, row by row and step by step."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SMALL, but_slow, lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig, baselines, rope
from nosa_jax.cache.state import device_bytes, with_pages

LENGTHS = np.array([150, 93, 20])  # the last row attends to everything
TOKENS = random_tokens(3, 150, seed=2)
NEW = 60  # tokens that are generated, so many that pages of them leave the window and come back
TWO_ROWS = 2_500_000  # bytes of a working set for two of the three: the last group reads a row again
POLICIES = {
    "ShadowKV": baselines.ShadowKV(chunk=8, rank=24, budget=48, local_chunks=2, outlier_chunks=2),
    "ArkVale": baselines.ArkVale(page=8, budget=10, page_topks=7, sink=1, window=3),
}


@pytest.fixture(scope="module")
def model():
    return lively_model(small_config(attention=dataclasses.replace(SMALL, variant="full")))


@functools.cache
def generated(policy: str, offload: bool) -> nosa_jax.Generation:
    """By the model of the fixture; the batch of this file."""
    model = lively_model(small_config(attention=dataclasses.replace(SMALL, variant="full")))
    cache = CacheConfig(offload=offload, policy=POLICIES[policy])
    return jax.device_get(nosa_jax.generate(model, TOKENS, LENGTHS, max_new_tokens=NEW, cache=cache, record=True))


@functools.partial(jax.jit, static_argnames="config")
def heads_of(config, layer, x, places):
    """Queries, keys before and after RoPE and values [B, T, heads, D] of one layer."""
    normed = layer.block(config, x, lambda _, x: (x, x))[1]
    qkv, cos_sin = layer.attention.heads(config, normed), rope.of_positions(config, places)
    q, k = qkv[..., :-2, :].reshape(*x.shape[:2], config.num_heads, config.head_dim), qkv[..., -2, :]
    return rope.rotate(q, *cos_sin), k, rope.rotate(k, *cos_sin), qkv[..., -1, :]


@functools.partial(jax.jit, static_argnames="config")
def after(config, layer, x, out):
    """What the next layer gets where attention gave `out`."""
    return layer.block(config, x, lambda attention, _: (attention.merge(out), None))[0]


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention [B, T, N, D]."""
    width = q.shape[1]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = np.einsum("bqkgd,bskd->bkgqs", grouped, k, optimize=True) / q.shape[-1] ** 0.5
    weights = np.exp(np.where(np.tri(width, dtype=bool), logits, -np.inf) - logits.max(-1, keepdims=True))
    out = np.einsum("bkgqs,bskd->bqkgd", weights / weights.sum(-1, keepdims=True), v, optimize=True)
    return out.reshape(q.shape)


def by_layers(model, policy, tokens: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, list[baselines.Trace]]:
    """Logits [B, new + 1, V] after the prompt and every new token, and a trace of each layer: no cache, one layer after
    the other.

    tokens: prompts of LENGTHS. new: int [B, new], what follows them.
    """
    config, embed = model.config, np.asarray(model.embed[...])
    places = (np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), LENGTHS[:, None] + np.arange(new.shape[1]))
    x, traces = (embed[tokens], embed[new]), []
    last = lambda x: np.take_along_axis(x, (LENGTHS - 1)[:, None, None, None], 1)[:, 0]
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda p, index=index: p[index], model.layers)
        prompt, steps = (
            jax.device_get(heads_of(config, layer, part, at.astype(np.int32)))
            for part, at in zip(x, places, strict=True)
        )
        by_head = dict(zip(("k_pre", "k_post", "v"), (np.moveaxis(part, 2, 1) for part in prompt[1:]), strict=True))
        case = (
            by_head
            | {"q_last_post": last(prompt[0])}
            | dict(zip(("dec_q_post", "dec_k_post", "dec_v"), (steps[0], *steps[2:]), strict=True))
        )
        traces.append(jax.device_get(baselines.replay(policy, case, lengths=LENGTHS)))
        outs = (dense(prompt[0], *prompt[2:]), traces[-1].out)
        x = tuple(np.asarray(after(config, layer, part, out)) for part, out in zip(x, outs, strict=True))
    hidden = np.concatenate([last(x[0][:, :, None]), x[1]], axis=1)
    return np.asarray(model.logits(model.final_norm(jnp.asarray(hidden)))), traces


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_computes_what_the_layers_do_alone(model, policy):
    ours = generated(policy, True)
    logits, traces = by_layers(model, POLICIES[policy], TOKENS, ours.tokens[:, :-1])
    np.testing.assert_allclose(ours.logits, logits, rtol=0, atol=1e-4)
    for layer, trace in enumerate(traces):
        ids = np.broadcast_to(np.moveaxis(trace.ids, 1, 2), ours.block_ids[layer][:, :, 1:].shape)
        np.testing.assert_array_equal(ours.block_ids[layer][:, :, 1:], ids)
        fetched = (np.moveaxis(trace.new_ids, 1, 2) >= 0).sum(-1)
        np.testing.assert_array_equal(ours.fetched[layer][:, :, 1:], np.broadcast_to(fetched, (3, 2, NEW - 1)))
    assert ours.fetched[:, :2].any() and not ours.fetched[:, 2].any() and not ours.fetched[..., 0].any()


@pytest.mark.parametrize("policy", but_slow(POLICIES, "ArkVale"))
def test_where_units_lie_changes_no_bit(policy):
    offloaded, on_device = generated(policy, True), generated(policy, False)
    for name in ("tokens", "logits", "block_ids"):
        np.testing.assert_array_equal(getattr(offloaded, name), getattr(on_device, name), err_msg=name)
    assert offloaded.fetched.any() and not on_device.fetched.any()  # nothing crosses where all is on the device
    assert np.isfinite(offloaded.logits).all()


@pytest.mark.parametrize("policy", but_slow(POLICIES, "ArkVale"))
def test_other_rows_change_no_bit(model, policy):
    whole, cache = generated(policy, True), CacheConfig(policy=POLICIES[policy])
    tokens, lengths = random_tokens(3, 150, seed=5), np.array([33, 93, 150])
    tokens[1] = TOKENS[1]
    other = nosa_jax.generate(model, tokens, lengths, max_new_tokens=NEW, cache=cache, record=True)
    np.testing.assert_array_equal(other.logits[1], whole.logits[1])
    for name in ("block_ids", "fetched"):
        np.testing.assert_array_equal(getattr(other, name)[:, 1], getattr(whole, name)[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_what_they_are_alone(model, policy):
    batch, cache = generated(policy, True), CacheConfig(policy=POLICIES[policy])
    for row in range(3):
        one = nosa_jax.generate(
            model, TOKENS[row : row + 1], LENGTHS[row : row + 1], max_new_tokens=NEW, cache=cache, record=True
        )
        np.testing.assert_array_equal(one.tokens[0], batch.tokens[row])
        np.testing.assert_allclose(one.logits[0], batch.logits[row], rtol=0, atol=2e-5)
        alone = np.asarray(one.block_ids[:, 0])
        np.testing.assert_array_equal(np.sort(alone), np.sort(batch.block_ids[:, row]))
        np.testing.assert_array_equal(one.fetched[:, 0], batch.fetched[:, row])


@pytest.mark.parametrize("policy", but_slow(POLICIES, "ArkVale"))
def test_steps_and_turns_are_a_generation(model, policy):
    """Prompts in groups of rows, decode steps one by one, then what is left as a turn of another length per row."""
    whole, cache = generated(policy, True), CacheConfig(policy=POLICIES[policy])
    limits = LENGTHS + NEW
    plan = functools.partial(nosa_jax.plan, model.config, 3, 210, cache, dtype=jnp.float32, prompt=150, new=NEW)
    assert plan(working_set=TWO_ROWS).reading.rows == 2
    state, logits = nosa_jax.prefill(model, TOKENS, LENGTHS, max_length=limits, cache=cache, working_set=TWO_ROWS)
    np.testing.assert_allclose(logits, whole.logits[:, 0], rtol=0, atol=2e-5)
    for step in range(3):
        state, logits = nosa_jax.jit_decode_step(model, state, whole.tokens[:, step])
        np.testing.assert_allclose(logits, whole.logits[:, step + 1], rtol=0, atol=2e-5)
    counts = np.array([NEW - 4, 0, 5])
    more, logits = nosa_jax.extend(model, state, whole.tokens[:, 3 : NEW - 1], counts)
    np.testing.assert_array_equal(more.lengths, LENGTHS + 3 + counts)
    for row in (0, 2):
        np.testing.assert_allclose(logits[row], whole.logits[row, 3 + counts[row]], rtol=0, atol=2e-5)
    more, logits = nosa_jax.jit_decode_step(model, more, whole.tokens[np.arange(3), 3 + counts].clip(0))
    np.testing.assert_allclose(logits[1:], whole.logits[np.arange(1, 3), 4 + counts[1:]], rtol=0, atol=2e-5)
    # A row at its limit stays as it is.
    more = dataclasses.replace(more, limits=more.lengths + 0)
    again, logits = nosa_jax.jit_decode_step(model, more, jnp.asarray(whole.tokens[:, 0]))
    assert np.isnan(logits).all()
    np.testing.assert_array_equal(again.lengths, again.limits)


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_counts_what_a_state_has(model, policy, offload):
    cache = CacheConfig(offload=offload, policy=POLICIES[policy])
    # Nothing is run: shapes alone.
    state = jax.eval_shape(lambda: nosa_jax.prefill(model, TOKENS[:, :144], max_length=200, cache=cache)[0])
    plan = nosa_jax.plan(model.config, 3, 200, cache, dtype=jnp.float32, prompt=144, new=56)
    parts = {name: size for name, size in plan.device.items() if name not in ("weights", "prefill")}
    assert sum(parts.values()) == device_bytes(state)
    assert plan.host_bytes == (0 if state.host is None else state.host.size * 4)
    assert (state.block_size, state.num_slots) == (8, plan.slots or plan.num_blocks)
    assert state.num_blocks == plan.num_blocks and "units" in str(plan)


SHADOW = POLICIES["ShadowKV"]
REFUSED = {
    "no policy": (lambda m: CacheConfig(policy="shadowkv"), "CacheConfig.policy", "Policy", "'shadowkv'", "Pass"),
    "slots": (lambda m: CacheConfig(policy=SHADOW, slots=64), "CacheConfig.slots", "policy", "64", "slots=None"),
    "infllm": (
        lambda m: prefilled(m, baselines.InfLLM()), "CacheConfig.policy", "engine", "InfLLM: its prefill", "replay"
    ),
    "infllm, recorded": (
        lambda m: nosa_jax.generate(m, TOKENS, cache=CacheConfig(policy=baselines.InfLLM()), record=True),
        "CacheConfig.policy", "engine", "InfLLM: its prefill", "replay",
    ),
    "recorded units as blocks": (
        lambda m: nosa_jax.Selections.from_generation(None, LENGTHS, config=m.config),
        "config", "units of its own", "'full'", "as they are",
    ),
    "a sparse model": (
        lambda m: prefilled(lively_model(small_config()), SHADOW),
        "CacheConfig.policy", "'full'", "'nosa'", "policy=None"
    ),
    "a chunk": (lambda m: prefilled(m, SHADOW, chunk=32), "chunk", "whole prompts", "32", "chunk=None"),
    "a large rank": (
        lambda m: prefilled(m, baselines.ShadowKV(rank=80)), "ShadowKV.rank", "K * D = 64", "80", "rank=64"
    ),
    "a small working set": (
        lambda m: prefilled(m, SHADOW, working_set=1000), "working_set", "one row", "1000", "Raise it"
    ),
    "more new tokens than a row may hold": (
        lambda m: nosa_jax.plan(m.config, 3, 200, CacheConfig(policy=SHADOW), prompt=144, new=201),
        "new", "<= 200", "201", "Lower it",
    ),
    "forced ids": (
        lambda m: nosa_jax.generate(
            m, TOKENS, cache=CacheConfig(policy=SHADOW), forced_block_ids=np.zeros((2, 3, 2, 64, 8), int)
        ),
        "forced_block_ids", "'full'", "array", "Drop it",
    ),
    "other pages": (
        lambda m: with_pages(jax.eval_shape(lambda: prefilled(m, SHADOW)[0]), 0, np.arange(2), 16),
        "state", "no policy", "ShadowKV", "Prefill anew",
    ),
    "a sparse model's turn": (
        lambda m: jax.eval_shape(
            lambda: nosa_jax.decode_step(lively_model(small_config()), prefilled(m, SHADOW)[0], TOKENS[:, 0])
        ),
        "state", "ShadowKV", "'full'", "'nosa'",
    ),
    "another model's state": (
        lambda m: jax.eval_shape(
            lambda: nosa_jax.decode_step(
                lively_model(small_config(layers=1, attention=dataclasses.replace(SMALL, variant="full"))),
                prefilled(m, SHADOW)[0], TOKENS[:, 0],
            )
        ),
        "state", "must go with the model", "[2, 3, 2", "Prefill with this model",
    ),
}  # fmt: skip


def prefilled(model, policy, **options):
    return nosa_jax.prefill(model, TOKENS, max_length=160, cache=CacheConfig(policy=policy), **options)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(model, name):
    call, *parts = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as error:
        call(model)
    for part in parts:
        assert part in str(error.value)
