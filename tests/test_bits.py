"""What holds of programs compiled as users' programs are, above all to the bit; other files compile quickly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import LENGTHS, NEW, forward, random_tokens

import nosa_jax
from nosa_jax import CacheConfig, presets
from nosa_jax.cache.state import empty_state
from nosa_jax.locality import replay_misses

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def offloaded(model, tokens):
    return nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=NEW, cache=CacheConfig(slots=9), record=True)


def test_an_offloaded_cache_gives_the_bits_of_one_on_the_device(model, tokens, offloaded):
    options = dict(max_new_tokens=NEW, cache=CacheConfig(offload=False), record=True)
    on_device = nosa_jax.generate(model, tokens, LENGTHS, **options)
    for name in ("logits", "tokens", "block_ids"):
        np.testing.assert_array_equal(getattr(offloaded, name), getattr(on_device, name))
    positions = LENGTHS[:, None, None] - 1 + np.arange(NEW)
    predicted = replay_misses(np.asarray(offloaded.block_ids), positions, model.config.attention, 9)
    np.testing.assert_array_equal(offloaded.fetched, predicted)


@pytest.mark.slow
def test_layers_staged_ahead_have_the_bits_of_those_on_the_device(model, tokens):
    """A prompt in chunks and an extension: with the cache in host memory the next layer is staged meanwhile."""
    more, counts, found = random_tokens(3, 70, seed=8), np.array([70, 0, 33]), []
    for cache in (CacheConfig(slots=9), CacheConfig(offload=False)):
        state, logits = nosa_jax.prefill(model, tokens, LENGTHS, max_length=440, cache=cache, chunk=100)
        found.append((logits, nosa_jax.extend(model, state, more, counts)[1]))
    for ahead, on_device in zip(*found, strict=True):
        np.testing.assert_array_equal(ahead, on_device)


@pytest.mark.slow
def test_the_compiled_step_gives_the_bits_of_generate(model, tokens, offloaded):
    state, logits = nosa_jax.prefill(model, tokens, LENGTHS, max_length=300 + NEW, cache=CacheConfig(slots=9))
    for number in range(NEW):
        np.testing.assert_array_equal(logits, offloaded.logits[:, number])
        state, logits = nosa_jax.jit_decode_step(model, state, offloaded.tokens[:, number])


def test_later_tokens_change_nothing_before_them(model):
    tokens = random_tokens(1, 400)
    before = forward(model, tokens, record=True)
    for i in (0, 15, 100, 255, 398):
        changed = tokens.copy()
        changed[:, i + 1 :] = random_tokens(1, 400 - i - 1, seed=7)
        after = forward(model, changed, record=True)
        np.testing.assert_array_equal(after.logits[:, : i + 1], before.logits[:, : i + 1])
        np.testing.assert_array_equal(after.block_ids[..., : i + 1, :], before.block_ids[..., : i + 1, :])
        assert not jnp.array_equal(after.logits, before.logits)


def test_step_copies_neither_pool_nor_host_store_nor_weights():
    """Read from the compiled program: temporaries stay below one layer's weights, and the state is updated in place."""
    model = nosa_jax.NosaLM(presets.tiny(), rngs=nnx.Rngs(0))
    batch = 4
    empty = jax.jit(lambda: empty_state(model.config, batch, 4096, CacheConfig(slots=40), jnp.float32))
    running = empty()
    step = jax.jit(nosa_jax.decode_step, donate_argnums=1)
    compiled = step.lower(model, running, jnp.zeros(batch, jnp.int32)).compile()
    memory = compiled.memory_analysis()
    layer_weights = sum(x.nbytes for x in jax.tree.leaves(model.layers)) // model.config.num_layers
    assert memory.temp_size_in_bytes < layer_weights
    assert memory.temp_size_in_bytes < min(running.pool.nbytes, running.host.nbytes)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(running))
    assert memory.alias_size_in_bytes >= state_bytes
