"""What compiles a program and what finds one: calls of the same shapes share it."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle

import jax
import numpy as np
import pytest
from support import forward, lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig, Sampling

TOKENS = random_tokens(2, 36, seed=6)
LENGTHS = np.array([36, 20])
_lowered: list[str] = []
_named: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _lowered.append(event))
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, fun_name="", **__: _named.append(fun_name) if "mlir_module" in event else None
)


pytestmark = pytest.mark.slow


@contextlib.contextmanager
def nothing_compiles():
    """No program is lowered, whether or not XLA would find it in its cache on disk."""
    _lowered.clear()
    jax.jit(lambda: jax.numpy.zeros(1)).lower()  # as this is
    assert [event for event in _lowered if "mlir_module" in event]
    _lowered.clear()
    yield
    assert not [event for event in _lowered if "mlir_module" in event]


@pytest.fixture(scope="module")
def model():
    return lively_model(small_config())


def test_forward_called_eagerly_compiles_once(model):
    segments = np.repeat([[0] * 16 + [1] * 20], 2, axis=0)
    calls = [
        lambda: nosa_jax.forward(model, TOKENS, record=True),
        lambda: model(TOKENS, LENGTHS, logits="last"),
        lambda: nosa_jax.forward(model, TOKENS, segment_ids=segments, remat=True),
        lambda: jax.grad(lambda model: nosa_jax.forward(model, TOKENS).logits.sum())(model),
    ]
    for call in calls:
        call()
        with nothing_compiles():
            call()


def test_forward_called_eagerly_has_the_bits_of_the_jitted_one(model):
    for options in ({"record": True}, {"logits": "last"}, {"remat": True}):
        jax.tree.map(
            np.testing.assert_array_equal,
            nosa_jax.forward(model, TOKENS, LENGTHS, **options),
            forward(model, TOKENS, LENGTHS, **options),
        )


def test_calls_of_the_same_shapes_share_a_program(model):
    def calls(tokens, lengths, sampling, stop, pad, seed):
        options = dict(max_new_tokens=3, sampling=sampling, key=jax.random.key(seed), stop_tokens=stop, pad_token=pad)
        nosa_jax.generate(model, tokens, lengths, **options)
        list(nosa_jax.stream(model, tokens, lengths, **options))
        state, _ = nosa_jax.prefill(model, tokens, lengths, max_length=48)
        state, _ = nosa_jax.decode_step(model, state, tokens[:, 0])
        nosa_jax.extend(model, state, tokens[:, :5], np.array([2, 5]))

    calls(TOKENS, LENGTHS, Sampling(0.7, 20, 0.9), [1], 0, 0)
    with nothing_compiles():
        calls(TOKENS[:, ::-1], np.array([7, 1]), Sampling(1.3, 20, 0.5), (), 9, 1)
        calls(TOKENS, LENGTHS, Sampling(1e-9, 20, 0.99), range(8), 3, 2)


def test_a_conversation_takes_four_programs(model):
    """Prompt, short turns, long turns and steps, whatever their lengths; beside what the caller's own code compiles."""
    rng = np.random.default_rng(0)
    turn = lambda width: rng.integers(0, 128, (2, width))
    _named.clear()
    state, _ = nosa_jax.prefill(model, turn(37), np.array([37, 5]), max_length=6000, cache=CacheConfig(slots=9))
    for _ in range(30):
        width = int(rng.choice([rng.integers(1, 64), rng.integers(64, 600)]))
        state, logits = nosa_jax.jit_extend(model, state, turn(width), rng.integers(0, width + 1, 2))
        for _ in range(int(rng.integers(1, 4))):
            state, logits = nosa_jax.jit_decode_step(model, state, np.argmax(logits, -1))
    ours = [name for name in _named if name in ("jit(read_prompt)", "jit(_more)", "jit(_step)")]
    assert sorted(ours) == ["jit(_more)", "jit(_more)", "jit(_step)", "jit(read_prompt)"]


def test_prompts_of_near_widths_share_a_generation(model):
    run = lambda width, new: nosa_jax.generate(model, TOKENS[:, :width], max_new_tokens=new).tokens
    _named.clear()
    run(36, 20)
    assert "jit(_generate)" in _named
    _named.clear()
    for width, new in ((34, 17), (35, 31), (33, 18)):
        assert run(width, new).shape == (2, new)
    assert "jit(_generate)" not in _named


def test_reprs_are_short_and_fetch_nothing(model):
    state, _ = nosa_jax.prefill(model, TOKENS, max_length=48, cache=CacheConfig(slots=8))
    gen = nosa_jax.generate(model, TOKENS, max_new_tokens=2, record=True)
    out = nosa_jax.forward(model, TOKENS, record=True)
    jax.tree.map(lambda x: x.delete(), (state, gen, out))  # nothing is left to fetch
    texts = [repr(x) for x in (state, gen, out, state.table, state.pooled_keys)]
    assert all(len(text) < 800 for text in texts), texts
    assert "pool=float32[2,2,2,3,2,16,32]" in texts[0] and "max_length=48" in texts[0]
    assert "host=float32[2,6,2,2,16,32] in pinned_host" in texts[0]
    assert "SlotTable(blocks=int32[2,2,2,3], last_used=int32[2,2,2,3])" in texts[0] and texts[3] in texts[0]
    assert texts[1].startswith("Generation(tokens=int32[2,2], lengths=int32[2], logits=float32[2,2,128]")
    assert texts[2].startswith("ForwardOutput(logits=float32[2,36,128]")
    assert "hidden=float32[2,36,48]" in str(jax.eval_shape(lambda: out))


def test_a_restored_state_goes_on_as_the_message_says(model):
    """See test_bad_input for the message."""
    state, _ = nosa_jax.prefill(model, TOKENS, max_length=48)
    token = TOKENS[:, 0]
    expected = nosa_jax.decode_step(model, state, token)[1]
    for restored in (jax.device_get(state), pickle.loads(pickle.dumps(state))):
        with pytest.raises(ValueError, match="state: host must lie in host memory"):
            nosa_jax.decode_step(model, restored, token)
        host = jax.device_put(restored.host, jax.memory.Space.Host)
        restored = dataclasses.replace(restored, host=host)
        np.testing.assert_array_equal(nosa_jax.decode_step(model, restored, token)[1], expected)


def test_a_donated_state_is_named(model):
    state, _ = nosa_jax.prefill(model, TOKENS, max_length=48)
    nosa_jax.jit_decode_step(model, state, TOKENS[:, 0])
    for call in (nosa_jax.decode_step, nosa_jax.extend):
        with pytest.raises(ValueError, match=r"state: must still hold its arrays.*the one returned"):
            call(model, state, TOKENS[:, :1] if call is nosa_jax.extend else TOKENS[:, 0])
