"""The likelihood of tokens, made in chunks, against the softmax of all logits."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support import LENGTHS, but_slow, lively_model, small_config

import nosa_jax
from nosa_jax import evals
from nosa_jax.evals.likelihood import _scores

INSIDE = np.arange(LENGTHS.max()) < LENGTHS[:, None]


def by_forward(model, tokens):
    """Log-likelihoods and greedy hits, from the logits of all positions."""
    logits = nosa_jax.forward(model, tokens, LENGTHS).logits
    own = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.roll(tokens, -1, 1)[..., None], -1)[..., 0]
    likely, greedy = np.roll(own, 1, 1), np.roll(np.asarray(logits.argmax(-1)), 1, 1) == tokens
    likely[:, 0], greedy[:, 0] = 0, False
    return np.where(INSIDE, likely, 0), greedy & INSIDE


@pytest.mark.parametrize("variant", but_slow(["nosa", "infllmv2", "dma", "full"], "infllmv2", "dma", "full"))
def test_it_is_the_softmax_of_forward_at_the_next_token(variant, tokens):
    model = nosa_jax.with_attention(lively_model(small_config()), variant=variant)
    likely, greedy = by_forward(model, tokens)
    found = evals.score_tokens(model, tokens, LENGTHS, chunk=64)
    assert found.log_likelihood.dtype == np.float32 and found.log_likelihood.shape == tokens.shape
    np.testing.assert_allclose(found.log_likelihood, likely, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.greedy, greedy)
    assert 0 < greedy.sum() < greedy.size
    mask = np.random.default_rng(0).random(tokens.shape) < 0.5
    masked = evals.log_likelihood(model, tokens, mask, LENGTHS, chunk=64)
    np.testing.assert_array_equal(masked, np.where(mask, found.log_likelihood, 0))

    batch = 3 if variant == "nosa" else 2  # the quick case runs the program that is there
    found = evals.perplexity_by_position(model, tokens, LENGTHS, mask, parts=3, batch_size=batch, chunk=64)
    counted = mask & INSIDE & (np.arange(300) > 0)
    parts = [slice(0, 100), slice(100, 200), slice(200, 300)]
    assert found.starts.tolist() == [0, 100, 200]
    assert found.counts.tolist() == [counted[:, part].sum() for part in parts]
    means = [-likely[:, part][counted[:, part]].mean() for part in parts]
    np.testing.assert_allclose(found.nats, means, rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, np.exp(means), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 40, 2048])
def test_chunks_and_jit_change_no_result(chunk, model, tokens):
    likely, _ = by_forward(model, tokens)
    np.testing.assert_allclose(evals.log_likelihood(model, tokens, None, LENGTHS, chunk), likely, rtol=0, atol=1e-5)
    jitted = jax.jit(lambda model, tokens: evals.log_likelihood(model, tokens, chunk=chunk))(model, tokens[:1, :65])
    np.testing.assert_allclose(jitted[0], likely[0, :65], rtol=0, atol=1e-5)


def test_logits_of_all_positions_are_never_made():
    """Of the program's arrays none is as large as they would be."""
    model = nosa_jax.NosaLM(dataclasses.replace(small_config(), vocab_size=160), rngs=nnx.Rngs(0))
    tokens = np.zeros((2, 512), np.int32)
    text = str(jax.make_jaxpr(lambda *args: _scores(model, *args, chunk=64))(tokens, tokens, tokens[:, 0] + 512))
    assert "f32[2,32,160]" in text and "f32[2,512,160]" not in text


def test_ties_go_to_the_lowest_id_as_in_decoding(model):
    """With no weights every token is as likely as any other."""
    flat = jax.tree.map(lambda x: x * 0, model)
    tokens = np.arange(900, dtype=np.int32).reshape(3, 300) % 2
    found = evals.score_tokens(flat, tokens, LENGTHS, chunk=64)
    np.testing.assert_array_equal(found.greedy, INSIDE & (tokens == 0) & (np.arange(300) > 0))
    np.testing.assert_allclose(found.log_likelihood[0, 1:], -np.log(model.config.vocab_size), rtol=1e-5)
    assert evals.log_likelihood(flat, tokens[:, :1]).tolist() == [[0]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model: must be a NosaLM"),
        ({"tokens": np.zeros(4, np.int32)}, "tokens: must be"),
        ({"tokens": np.full((1, 4), 128)}, "tokens: ids must be in"),
        ({"lengths": [5]}, "lengths: must be in"),
        ({"chunk": 0}, "chunk: must be >= 1"),
        ({"mask": np.ones((1, 3), bool)}, "mask: must have shape"),
        ({"mask": np.ones((1, 4), int)}, "mask: must hold bools"),
    ],
)
def test_refusals(options, message, model, without_type_checker):
    given = {"model": jax.tree.map(lambda x: x * 0, model), "tokens": np.zeros((1, 4), np.int32)} | options
    with pytest.raises((ValueError, TypeError), match=message):
        evals.log_likelihood(**given)
    if message.startswith("mask"):
        return
    with pytest.raises((ValueError, TypeError), match=message):
        evals.perplexity_by_position(**given)


def test_text_without_tokens_that_count_is_refused(model):
    with pytest.raises(ValueError, match="tokens: must hold tokens that count"):
        evals.perplexity_by_position(model, np.zeros((1, 1), np.int32))


@pytest.mark.slow
def test_meshes_change_no_result(tmp_path):
    """Rows, the vocabulary and queries cut among devices; a program of its own, which has four."""
    script = """
import numpy as np
from dataclasses import replace
from support import *
from nosa_jax import evals, parallel
tokens, lengths = np.concatenate([prompts(), prompts()[:1]]), np.append(LENGTHS, 300)
for tied in (True, False):
    model = lively_model(replace(small_config(), tie_embeddings=tied))
    alone = evals.score_tokens(model, tokens, lengths, chunk=64)
    for axes in ({"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}):
        for explicit in (False, True):
            mesh = parallel.make_mesh(**axes, explicit=explicit)
            found = evals.score_tokens(parallel.shard(model, mesh), tokens, lengths, chunk=64)
            np.testing.assert_allclose(found.log_likelihood, alone.log_likelihood, rtol=0, atol=3e-5)
            assert (found.greedy == alone.greedy).mean() > 0.99
"""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
