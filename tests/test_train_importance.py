"""A fitted start for importance: what far queries attend to, regressed on values."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SMALL, lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import train
from nosa_jax.attention.layout import packed_layout
from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.source import Cut
from nosa_jax.train.importance import Moments, explained, far_mass, merged, moments_of, regression


@functools.cache
def planted():
    """A dense model of one layer whose queries all look one way, in dimensions that RoPE hardly turns: who is attended
    to is a linear function of keys then, and so of values, both being one of the same vectors."""
    config = small_config(attention=dataclasses.replace(SMALL, variant="full"), layers=1)
    model = lively_model(dataclasses.replace(config, qkv_bias=True))
    model.layers.attention.qkv[...] *= jnp.array([0.1, 0.1, 1, 1])[:, None]  # of two query heads, the key, the value
    model.layers.attention.qkv_bias[...] = model.layers.attention.qkv_bias[...].at[:, :, :2, 12:16].set(2.0)
    return model


def source(length=256, count=24, size=256, block_size=SMALL.block_size, **options):
    ids = random_tokens(count * size, seed=3)
    starts = size * np.arange(count)
    cut = Cut(length, True, block_size)
    spans = np.stack([starts, starts + size], axis=1)
    return cut.source(Tokens([ids]), spans, **{"bytes_per_token": 1.0, "vocab_size": 128} | options)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_far_mass_is_what_its_definition_says(chunk):
    """Two documents and padding in a row of 90 tokens, blocks of 4, two of them local."""
    attention = dataclasses.replace(SMALL, block_size=4, num_local_blocks=2)
    q, k = jax.random.normal(jax.random.key(0), (1, 90, 4, 8)), jax.random.normal(jax.random.key(1), (1, 2, 90, 8))
    segments = jnp.repeat(jnp.array([0, 1, -1]), jnp.array([40, 46, 4]))
    mass, queries = far_mass(q, k, packed_layout(segments[None], None, 4), attention, chunk)
    expected, count = np.zeros((2, 90)), np.zeros(90, int)
    for t in range(86):
        start = 0 if t < 40 else 40
        scores = np.einsum("hgd,hsd->hgs", q[0, t].reshape(2, 2, 8), k[0, :, start : t + 1]) / 8**0.5
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        for s in range(start, t + 1):
            if t // 4 - s // 4 >= 2:
                expected[:, s] += (t + 1 - start) * p[:, :, s - start].sum(1)
                count[s] += 1
    np.testing.assert_array_equal(queries[0], count)
    np.testing.assert_allclose(mass[0], expected / np.maximum(count, 1), rtol=1e-5)


def test_regression_finds_a_planted_relation():
    """Of values far from 0 in three batches of several sizes, some tokens of which do not count."""
    rng = np.random.default_rng(0)
    weights, constant = rng.normal(size=(6, 2)), np.array([3.0, -40.0])
    values = rng.normal(size=(3, 2, 50, 6)) + 10
    targets = values @ weights + constant + [0.0, 0.5] * rng.normal(size=(3, 2, 50, 2))
    valid = rng.random((3, 2, 50)) < np.array([0.9, 0.5, 0.2])[:, None, None]
    targets[~valid] = 1e6
    both = np.concatenate([values, targets], -1).astype(np.float32)
    parts = [moments_of(jnp.asarray(x), jnp.asarray(w)) for x, w in zip(both, valid, strict=True)]
    parts = [Moments(*(np.asarray(x, np.float64)[None] for x in part)) for part in parts]
    whole = merged(parts)
    assert whole.count[0] == valid.sum()
    found, found_constant = regression(whole, 2, ridge=1e-9)
    np.testing.assert_allclose(found[0, :, 0], weights[:, 0], atol=1e-4)
    np.testing.assert_allclose(found[0, :, 1], weights[:, 1], atol=0.2)
    np.testing.assert_allclose(found_constant[0, 0], constant[0], atol=1e-3)
    errors = (targets - values @ found[0] - found_constant[0])[valid]
    expected = 1 - (errors**2).sum(0) / ((targets[valid] - targets[valid].mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(explained(whole, found, found_constant)[0], expected, atol=1e-4)
    off = explained(whole, found, found_constant + 100)[0]  # a fit that misses the mean explains less than nothing
    assert (off < -100).all()
    assert np.isnan(explained(whole._replace(scatter=0 * whole.scatter), found, found_constant)).all()


def test_the_fit_makes_selection_follow_the_mass():
    fitted, report = train.fit_importance(planted(), source(), batches=6, batch_size=2, chunk=100)
    assert report.r2.shape == (1, 2) and report.r2.min() > 0.9
    # Of each row of 256 those count that are behind the sink and have a block of far queries: block 12 is the last.
    assert (report.tokens, report.checked_tokens) == (5 * 2 * 16 * 12, 2 * 16 * 12)
    importance = fitted.layers.attention.importance
    np.testing.assert_array_equal(importance.A[...], np.full((1, 2), 1e-4, np.float32))
    assert fitted.config.attention == dataclasses.replace(SMALL, variant="nosa")
    assert fitted.embed[...] is planted().embed[...] and planted().layers.attention.importance is None

    # What each token of the vocabulary is worth to the first head: the way that all its queries look, times its key.
    key = planted().layers.attention.qkv[0, :, 0, 2]
    worth = (planted().embed[...] / jnp.linalg.norm(planted().embed[...], axis=1)[:, None]) @ key
    ranked = np.argsort(worth[:, 12:16].sum(1) + worth[:, 28:32].sum(1))
    tokens = ranked[random_tokens(16, 16, seed=9, vocab=96)]
    tokens[[4, 6, 9, 11]] = ranked[96:112]
    chosen = nosa_jax.with_attention(fitted, variant="dma")
    for model, middle in ((chosen, [4, 6, 9, 11]), (nosa_jax.with_attention(planted(), variant="dma"), [1, 2, 3, 4])):
        ids = nosa_jax.forward(model, tokens.reshape(1, 256), record=True).block_ids[0, 0, 0, -1]
        assert ids.tolist() == [0, *middle, 13, 14, 15]

    again, _ = train.fit_importance(chosen, source(), batches=6, batch_size=2, scale=0.5)
    assert again.config.attention.variant == "dma" and float(again.layers.attention.importance.A[0, 0]) == 0.5
    np.testing.assert_allclose(again.layers.attention.importance.delta[...], importance.delta[...], atol=1e-4)
    np.testing.assert_array_equal(chosen.layers.attention.importance.A[...], importance.A[...])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": [1]}, TypeError, "source: must be a Source"),
        ({"batches": 1}, ValueError, "batches: must be >= 2, got 1"),
        ({"ridge": 0.0}, ValueError, "ridge: must be >= 1e-12"),
        ({"source": source(64)}, ValueError, "source: must have rows of at least 80 tokens, .*, got 64"),
        ({"source": source(size=64)}, ValueError, "source: must give fitted batches with tokens that are far"),
        ({"source": source(block_size=8)}, ValueError, "source: documents must start on blocks of the model, .* of 16"),
        ({"source": source(vocab_size=129)}, ValueError, "source: must hold token ids below vocab_size = 128"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message, without_type_checker):
    with pytest.raises(error, match=message):
        train.fit_importance(planted(), **{"source": source(), "batches": 2} | options)


def test_a_model_that_computes_nan_is_refused():
    broken = nosa_jax.cast(planted(), jnp.float32)
    broken.embed[...] = broken.embed[...].at[5].set(jnp.nan)
    with pytest.raises(FloatingPointError, match=r"^model: must compute finite values .*fitted batches"):
        train.fit_importance(broken, source(), batches=2, batch_size=2, chunk=100)
