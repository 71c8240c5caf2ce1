"""generate and stream: sampling, stop tokens, recording, replay."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import LENGTHS, NEW, OFFLOADED, lively_model, small_config
from support import step as run_step

import nosa_jax
from nosa_jax import CacheConfig, Sampling
from nosa_jax.decode.sampling import filter_logits, sample

SAMPLED = Sampling(temperature=1.0, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def greedy(model, tokens):
    return nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=NEW, cache=OFFLOADED, record=True)


@pytest.fixture(scope="module")
def sampled(model, tokens):
    keys = jax.random.split(jax.random.key(1), 3)
    return nosa_jax.generate(
        model, tokens, LENGTHS, max_new_tokens=NEW, cache=OFFLOADED, sampling=SAMPLED, key=keys, record=True
    )


@pytest.mark.slow
def test_stream_yields_the_tokens_of_generate(model, tokens, greedy):
    streamed = list(nosa_jax.stream(model, tokens, LENGTHS, max_new_tokens=NEW, cache=OFFLOADED))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), greedy.tokens)


def test_stream_records_what_generate_records(model, tokens, sampled):
    """Step by step in host memory, to the bit."""
    keys = jax.random.split(jax.random.key(1), 3)
    options = dict(max_new_tokens=NEW, cache=OFFLOADED, sampling=SAMPLED, key=keys, record=True)
    steps = list(nosa_jax.stream(model, tokens, LENGTHS, **options))
    for number, step in enumerate(steps):
        assert isinstance(step, nosa_jax.Step)
        for name, axis in (("tokens", 1), ("logits", 1), ("block_ids", 3), ("fetched", 3)):
            ours = getattr(step, name)
            assert isinstance(ours, np.ndarray)
            np.testing.assert_array_equal(ours, np.take(np.asarray(getattr(sampled, name)), number, axis))
    assert len(steps) == NEW


def test_only_what_was_asked_for_is_recorded(model, tokens, without_type_checker):
    gen = jax.eval_shape(lambda: nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=2, record="logits"))
    assert gen.logits.shape == (3, 2, 128)
    assert gen.block_ids is None and gen.fetched is None
    gen = jax.eval_shape(lambda: nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=2, record=("fetched",)))
    assert gen.logits is None and gen.block_ids is None and gen.fetched.shape == (2, 3, 2, 2)
    for nothing in (np.False_, ()):
        assert next(
            nosa_jax.stream(model, tokens, LENGTHS, max_new_tokens=NEW, cache=OFFLOADED, record=nothing)
        ).shape == (3,)


@pytest.mark.slow
def test_stream_records_only_what_was_asked_for(model, tokens):
    step = next(nosa_jax.stream(model, tokens, LENGTHS, max_new_tokens=NEW, cache=OFFLOADED, record=("fetched",)))
    assert step.logits is None and step.block_ids is None and step.fetched.shape == (2, 3, 2)


def test_the_compiled_step_gives_the_bits_of_the_plain_one_and_takes_the_state(model, tokens, monkeypatch):
    state, logits = nosa_jax.prefill(model, tokens, LENGTHS, max_length=300 + NEW, cache=OFFLOADED)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    expected, expected_logits = run_step(model, state, token)
    jax.jit(nosa_jax.jit_decode_step).lower(model, state, token)  # inside another program it is a part of that
    assert not state.pool.is_deleted()
    after, logits = nosa_jax.jit_decode_step(model, state, np.asarray(token))
    assert state.pool.is_deleted() and state.host.is_deleted() and not after.pool.is_deleted()
    np.testing.assert_array_equal(logits, expected_logits)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="tokens: must have the state's 3 rows, got 2"):
        nosa_jax.jit_decode_step(model, after, np.array([1, 2]))
    with pytest.raises(ValueError, match="tokens: ids must be in"):
        nosa_jax.jit_decode_step(model, after, np.array([1, 2, 128]))
    unsigned = token.astype(jnp.uint32)
    for name in ("__int__", "__bool__", "__array__"):  # a loop runs ahead of the device: it does not look there
        monkeypatch.setattr(type(token), name, None)
    monkeypatch.setattr(jax, "device_get", None)
    with jax.transfer_guard("disallow"):
        after, _ = nosa_jax.jit_decode_step(model, after, token)
    nosa_jax.jit_decode_step(model, after, unsigned)


def test_a_sampled_row_is_what_it_would_be_alone(model, tokens, sampled):
    keys = jax.random.split(jax.random.key(1), 3)
    options = dict(max_new_tokens=NEW, cache=OFFLOADED, sampling=SAMPLED)
    for row, length in enumerate(LENGTHS):
        alone = nosa_jax.generate(model, tokens[row : row + 1], [length], key=keys[row : row + 1], **options)
        np.testing.assert_array_equal(alone.tokens[0], sampled.tokens[row])
    other = nosa_jax.generate(model, tokens, LENGTHS, key=jax.random.key(2), record=True, **options)
    assert not np.array_equal(other.tokens, sampled.tokens)


def test_raw_and_typed_keys_agree(model, tokens):
    options = dict(max_new_tokens=NEW, cache=OFFLOADED, sampling=SAMPLED, record=True)
    keys = (jax.random.key(3), jax.random.PRNGKey(3))
    np.testing.assert_array_equal(
        *(nosa_jax.generate(model, tokens, LENGTHS, key=key, **options).tokens for key in keys)
    )


def test_greedy_takes_the_best_and_records_what_it_was_drawn_from(greedy):
    np.testing.assert_array_equal(greedy.tokens, jnp.argmax(greedy.logits, -1))
    np.testing.assert_array_equal(greedy.lengths, [NEW] * 3)


def test_rows_stop_at_stop_tokens_and_the_loop_ends(model, tokens, greedy):
    stop = [int(greedy.tokens[row, step]) for row, step in enumerate((6, 11, 3))]
    options = dict(max_new_tokens=NEW, cache=OFFLOADED, stop_tokens=stop, pad_token=127)
    gen = nosa_jax.generate(model, tokens, LENGTHS, record=True, **options)
    for row in range(3):
        end = int(np.flatnonzero(np.isin(greedy.tokens[row], stop))[0]) + 1
        assert gen.lengths[row] == end
        np.testing.assert_array_equal(gen.tokens[row, :end], greedy.tokens[row, :end])
        assert (np.asarray(gen.tokens[row, end:]) == 127).all()
        np.testing.assert_array_equal(gen.logits[row, :end], greedy.logits[row, :end])
        assert (np.asarray(gen.logits[row, end:]) == 0).all()
        assert (np.asarray(gen.block_ids[:, row, :, end:]) == -1).all()
        assert (np.asarray(gen.fetched[:, row, :, end:]) == 0).all()
    assert len(list(nosa_jax.stream(model, tokens, LENGTHS, **options))) == int(np.max(gen.lengths))


@pytest.mark.slow
def test_forced_tokens_and_selections_replay_a_run(model, tokens, greedy):
    def replayed(block_ids):
        options = dict(max_new_tokens=NEW, cache=OFFLOADED, forced_tokens=greedy.tokens, record=True)
        return nosa_jax.generate(model, tokens, LENGTHS, forced_block_ids=block_ids, **options)

    again = replayed(greedy.block_ids)
    for name in ("tokens", "logits", "block_ids", "fetched"):
        np.testing.assert_array_equal(getattr(again, name), getattr(greedy, name))
    # Another selection gives other logits: the ids are really used.
    ids = np.full_like(greedy.block_ids, -1)
    ids[..., 0] = (LENGTHS[None, :, None, None] - 1 + np.arange(NEW)) // 16  # the own block alone
    narrow = replayed(ids)
    np.testing.assert_array_equal(narrow.block_ids, ids)
    assert not np.allclose(narrow.logits[:, 5], greedy.logits[:, 5], atol=1e-2)


@pytest.mark.slow
def test_a_run_that_stopped_is_replayed_beyond_its_end(model, tokens, greedy):
    """What was not recorded after a row had stopped is selected."""
    ids = np.asarray(greedy.block_ids).copy()
    ids[:, 1, :, 8:] = -1
    options = dict(max_new_tokens=NEW, cache=OFFLOADED, forced_tokens=greedy.tokens, record=True)
    again = nosa_jax.generate(model, tokens, LENGTHS, forced_block_ids=ids, **options)
    np.testing.assert_array_equal(again.block_ids, greedy.block_ids)
    np.testing.assert_array_equal(again.logits, greedy.logits)


def test_stream_is_refused_where_it_cannot_be_traced(model, tokens):
    with pytest.raises(TypeError, match=r"stream: cannot run inside jax\.jit.* Use generate"):
        jax.jit(lambda tokens: nosa_jax.stream(model, tokens, max_new_tokens=2))(tokens)


def test_filter_logits_literally():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    minus = -np.inf

    def kept(**options):
        return np.isfinite(np.asarray(filter_logits(logits, Sampling(temperature=1.0, **options)))).tolist()[0]

    assert kept() == [True] * 4
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_k=3) == [True, True, True, True]  # the third and fourth tie
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    for tiny in (1e-9, 1e-40, 1e-50, 5e-324):
        assert kept(top_p=tiny) == [True, False, False, False]
    halved = np.asarray(filter_logits(logits, Sampling(temperature=0.5)))
    np.testing.assert_allclose(halved, 2 * logits)
    assert minus not in halved


def test_greedy_needs_no_keys_and_takes_them():
    logits, keys, places = jnp.array([[0.0, 3.0, 1.0]]), jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32)
    assert sample(logits, keys, places, Sampling()).tolist() == sample(logits, None, places, Sampling()).tolist() == [1]


def test_sampling_follows_the_distribution():
    probabilities = np.array([0.6, 0.3, 0.1])
    rows = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (rows, 3))
    keys = jax.random.split(jax.random.key(0), rows)
    drawn = sample(logits, keys, jnp.zeros(rows, jnp.int32), Sampling(temperature=1.0))
    counts = np.bincount(np.asarray(drawn), minlength=3) / rows
    np.testing.assert_allclose(counts, probabilities, atol=0.03)


LOGITS = jnp.array([[1.0, 3.0, 2.0, -np.inf], [-5.0, -7.0, -4.0, -6.0]])


def drawn(sampling, logits=LOGITS, draws=200):
    """Which tokens come, per row of logits."""
    rows = jnp.repeat(logits, draws, axis=0)
    keys = jax.random.split(jax.random.key(0), rows.shape[0])
    tokens = sample(rows, keys, jnp.zeros(rows.shape[0], jnp.int32), sampling)
    return [set(row.tolist()) for row in np.asarray(tokens).reshape(-1, draws)]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-38])
def test_a_temperature_next_to_zero_takes_the_best(temperature):
    for rest in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert drawn(Sampling(temperature, **rest)) == [{1}, {2}], rest


def test_a_huge_temperature_takes_any_possible_token():
    for temperature in (1e30, 1e39, 1e300):
        assert drawn(Sampling(temperature)) == [{0, 1, 2}, {0, 1, 2, 3}]
        assert drawn(Sampling(temperature, top_k=10**12, top_p=1 - 1e-12)) == [{0, 1, 2}, {0, 1, 2, 3}]


def test_top_p_keeps_the_fewest_tokens_and_of_equal_ones_the_first():
    even = jnp.zeros((1, 4))
    for top_p, count in ((0.1, 1), (0.5, 2), (0.51, 3), (0.99, 4)):
        kept = np.isfinite(filter_logits(even, Sampling(1.0, top_p=top_p)))
        assert kept.tolist() == [[True] * count + [False] * (4 - count)]
    both = filter_logits(jnp.log(jnp.array([[0.3, 0.4, 0.3]])), Sampling(1.0, top_k=2, top_p=0.6))
    assert np.isfinite(both).tolist() == [[True, True, False]]  # of 0.3, 0.4, 0.3: top_k keeps its ties, top_p does not


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=3, top_p=0.5)])
def test_logits_without_a_finite_best_end_the_row(tokens, sampling):
    """The second row meets a token whose embedding is NaN; the first has nothing to do with it."""
    untied = lively_model(dataclasses.replace(small_config(), tie_embeddings=False))  # NaN meets its readers alone
    broken, bad = jax.tree.map(lambda x: x, untied), 77
    broken.embed[...] = broken.embed[...].at[bad].set(jnp.nan)
    prompt = np.where(tokens[:2, :40] == bad, (bad + 1) % 128, tokens[:2, :40])
    options = dict(max_new_tokens=6, sampling=sampling, key=jax.random.key(0), pad_token=7)
    prompt[1, 20] = bad
    with pytest.raises(FloatingPointError, match=r"logits.*row 1.*step 0"):
        nosa_jax.generate(broken, prompt, **options)
    with pytest.raises(FloatingPointError, match=r"logits.*row 1.*step 0"):
        next(nosa_jax.stream(broken, prompt, **options))
    gen = jax.jit(lambda model, tokens: nosa_jax.generate(model, tokens, **options))(broken, prompt)
    assert gen.failed.tolist() == [False, True]
    assert gen.lengths.tolist()[1] == 0 and (np.asarray(gen.tokens)[1] == 7).all()


@pytest.mark.slow
def test_numpy_numbers_and_nested_lists_are_taken(model, tokens, without_type_checker):
    few, lengths = tokens[:2, :20], [20, 13]
    plain = dict(max_new_tokens=2, pad_token=5, stop_tokens=[3], chunk=16, record=True)
    numbers = dict(
        max_new_tokens=np.int64(2), pad_token=jnp.int32(5), stop_tokens=np.array([3]), chunk=np.int8(16), record=True
    )
    sampling = [Sampling(0.5, 3, 0.75), Sampling(jnp.float32(0.5), np.int64(3), np.float32(0.75))]
    assert sampling[0] == sampling[1] and isinstance(sampling[1].top_k, int)
    caches = [CacheConfig(slots=9), CacheConfig(offload=np.True_, slots=np.int32(9))]
    assert caches[0] == caches[1] and hash(caches[0]) == hash(caches[1])
    key = jax.random.key(0)
    expected = nosa_jax.generate(model, few, lengths, cache=caches[0], sampling=sampling[0], key=key, **plain)
    got = nosa_jax.generate(model, few.tolist(), lengths, cache=caches[1], sampling=sampling[1], key=key, **numbers)
    again = nosa_jax.generate(
        model, few, lengths, cache=caches[0], sampling=sampling[0], key=key, **plain,
        forced_tokens=np.asarray(got.tokens).tolist(), forced_block_ids=np.asarray(got.block_ids).tolist(),
    )  # fmt: skip
    for other in (got, again):
        jax.tree.map(np.testing.assert_array_equal, other, expected)
    state, _ = nosa_jax.prefill(model, few, max_length=np.int64(24), cache=caches[1])
    assert isinstance(state.max_length, int)
    for stop in ({3, 5}, range(4), (x for x in [3, 5]), [jnp.int32(3)], np.array([], np.int64), jnp.array([3]), b"ab"):
        assert nosa_jax.generate(model, few, max_new_tokens=1, stop_tokens=stop).lengths.tolist() == [1, 1]
