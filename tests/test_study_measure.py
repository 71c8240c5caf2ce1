"""What the study measures, against the same by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax
from experiments.study import measure
from experiments.study.arms import SIZES

SIZE = dataclasses.replace(SIZES["cpu"], measured=2, decode_steps=80, length=192, read=(128, 192))
DOCUMENTS = random_tokens(3, 192, seed=2)


@pytest.fixture(scope="module")
def model():
    return lively_model(small_config())


@pytest.fixture(scope="module")
def whole(model):
    return nosa_jax.forward(model, DOCUMENTS, record=True)


def test_losses_are_means_of_the_tokens_of_each_part(model, whole):
    """Three documents in batches of two: the last batch is filled up."""
    found = measure.losses(model, DOCUMENTS, batch_size=2)
    logits = np.asarray(jax.nn.log_softmax(whole.logits))
    nats = -np.take_along_axis(logits[:, :-1], DOCUMENTS[:, 1:, None], -1)[..., 0]
    ends = np.arange(12, 192, 12) - 1  # the first part lacks the first token, which nothing predicts
    parts = np.stack([part.mean(1) for part in np.split(nats, ends, axis=1)], axis=1)
    assert found.shape == (3, 16) and found.dtype == np.float64
    np.testing.assert_allclose(found, parts, rtol=1e-4)


@pytest.mark.slow
def test_quality_and_locality_of_chosen_documents(model, whole, monkeypatch):
    monkeypatch.setattr(measure, "losses", lambda model, documents: np.ones((len(documents), 16)))
    found, recorded = measure.quality_and_locality(model, DOCUMENTS, SIZE, "mine")
    assert json.loads(json.dumps(found, allow_nan=False)) == found and found["losses"] == [[1.0] * 16] * 3
    ids = np.asarray(whole.block_ids)[:, [0, 2], :, -80:]
    np.testing.assert_array_equal(recorded.block_ids, ids)
    assert recorded.label == "mine" and recorded.positions.tolist() == [list(range(112, 192))] * 2
    assert set(found) == {"losses", "locality", "locality after 128"}
    assert found["locality after 128"]["blocks_in_all"] == 8
    numbers = found["locality"]
    kept = [len(set(a) & set(b)) / 8 for row in ids.reshape(-1, 80, 8) for a, b in itertools.pairwise(row)]
    assert numbers["gamma"] == pytest.approx(np.mean(kept), abs=1e-5)
    assert list(numbers["misses"]) == list(numbers["optimal_misses"]) == ["8", "10", "12", "16"]
    assert all(0 < numbers["optimal_misses"][slots] <= numbers["misses"][slots] for slots in ("8", "10"))
    # Of two bytes, whatever the model has: keys and values of 16 tokens and 32 dimensions, two layers of two KV heads.
    crossing = numbers["misses"]["8"] * 4 * 2 * 16 * 32 * 2
    assert numbers["bytes_per_token"]["8"] == pytest.approx(crossing, rel=1e-3)
    assert numbers["blocks_in_all"] == 12
    first = measure.first_rows(recorded, 1)
    np.testing.assert_array_equal(first.block_ids, recorded.block_ids[:, :1])
    assert first.positions.shape == (1, 80) and first.label == "mine"


def test_dense_attention_has_losses_alone(model, monkeypatch):
    monkeypatch.setattr(measure, "losses", lambda model, documents: np.ones((len(documents), 16)))
    dense = nosa_jax.with_attention(model, variant="full")
    found, recorded = measure.quality_and_locality(dense, DOCUMENTS, SIZE, "full")
    assert list(found) == ["losses"] and recorded is None


def test_biases_that_are_tried(model, monkeypatch):
    tried = lambda changed, documents: np.array(changed.layers.attention.importance.A[...] / importance.A[...])
    importance = model.layers.attention.importance
    monkeypatch.setattr(measure, "losses", tried)
    found = measure.without_exact_bias(model, DOCUMENTS)
    np.testing.assert_allclose(found["over sqrt(D)"], np.full((2, 2), 32**-0.5), atol=1e-5)
    assert found["none"] == [[0.0, 0.0], [0.0, 0.0]]  # rounded
