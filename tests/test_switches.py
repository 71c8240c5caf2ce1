"""JAX's switches: 64-bit numbers and strict promotion change neither what runs nor, for the same dtypes, its bits."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import SMALL, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig, NosaLM, Sampling
from nosa_jax.train import OptimizerConfig, init_state, jit_train_step

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def strict_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


SWITCHES = {"64-bit numbers": lambda: jax.enable_x64(True), "strict promotion": strict_promotion}
TOKENS, LENGTHS = random_tokens(2, 36), np.array([36, 20])
SEGMENTS = np.repeat([0, 1, -1], (16, 12, 8))[None].repeat(2, 0)


@functools.cache
def model() -> NosaLM:
    return NosaLM(small_config(kv_heads=1, dim=16, attention=SMALL, layers=1), rngs=nnx.Rngs(0))


def forward():
    out = nosa_jax.forward(model(), TOKENS, LENGTHS, record=True)
    return out, nosa_jax.forward(model(), TOKENS, segment_ids=SEGMENTS, logits="last")


def decode(offload: bool):
    cache = CacheConfig(offload=offload)
    state, first = nosa_jax.prefill(model(), TOKENS, LENGTHS, max_length=48, cache=cache, chunk=20)
    state, second = nosa_jax.decode_step(model(), state, TOKENS[:, 0])
    state, third = nosa_jax.extend(model(), state, TOKENS[:, :5], np.array([5, 3]))
    return first, second, third, state.lengths, state.table


def generate():
    sampling, key = Sampling(temperature=0.7, top_k=9, top_p=0.9), jax.random.key(1)
    drawn = nosa_jax.generate(model(), TOKENS, max_new_tokens=3, sampling=sampling, key=key, record=("block_ids",))
    replay = {"forced_tokens": drawn.tokens, "forced_block_ids": drawn.block_ids}
    again = nosa_jax.generate(model(), TOKENS, max_new_tokens=3, record=("block_ids",), **replay)
    return drawn, again, list(nosa_jax.stream(model(), TOKENS[:1], max_new_tokens=2, stop_tokens=[5]))


def train():
    state, metrics = jit_train_step(
        init_state(model(), OptimizerConfig()), jnp.asarray(TOKENS), optimizer=OptimizerConfig(), steps=9, accumulate=2
    )
    return state.model, metrics


CALLS = {
    "forward": forward,
    "decode from the host": functools.partial(decode, True),
    "decode on the device": functools.partial(decode, False),
    "generate": generate,
    "train": train,
}


@functools.cache
def usual(call: str):
    return jax.tree.map(np.asarray, CALLS[call]())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_results_do_not_depend_on_the_switch(switch, call):
    expected = usual(call)
    with SWITCHES[switch]():
        ours = jax.tree.map(np.asarray, CALLS[call]())

    def same(mine, theirs):
        assert mine.dtype == theirs.dtype
        # The optimizer's own numbers, such as the learning rate, have 64 bits on the way then.
        tolerance = 1e-7 if (switch, call) == ("64-bit numbers", "train") else 0
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)

    jax.tree.map(same, ours, expected)
