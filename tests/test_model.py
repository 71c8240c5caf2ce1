"""The model as a whole: gradients against dense attention, locality of its selections, presets, compilation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SMALL, _selection_scores, forward, lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import locality, presets
from pallas_kernels.block_attention.reference import token_mask
from pallas_kernels.device import Device
from pallas_kernels.formulas import rms_norm


def dense_loss(params, config, tokens, block_ids):
    """The mean log-likelihood of the next token, in plain float64 numpy-like JAX with dense masked attention.

    Written from the equations alone; shares nothing with the model but the parameters and the selection mask.
    """
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    length = tokens.shape[0]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    frequencies = config.rope.theta ** (-jnp.arange(0, dim, 2) / dim)
    angles = positions[0, :, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def rotate(x):
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def norm(x, w):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w

    x = params["embed"][tokens]
    for index in range(config.num_layers):
        at = {name: value[index] for name, value in params.items() if name not in ("embed", "norm")}
        qkv = jnp.einsum("th,hkmd->tkmd", norm(x, at["attention_norm"]), at["qkv"])
        q, k, v = qkv[:, :, :-2].reshape(length, heads, dim), qkv[:, :, -2], qkv[:, :, -1]
        bias = at["A"] * jnp.log1p(jnp.exp(jnp.einsum("tkd,kdn->tn", v, at["delta"])))  # [T, K]
        q, k = rotate(q), rotate(k)
        ids = None if block_ids is None else block_ids[index]
        mask = token_mask(ids, positions, None, num_tokens=length, block_size=config.attention.block_size)[0]
        outs = []
        for head in range(heads):
            g = head // (heads // kv_heads)
            logits = q[:, head] @ k[:, g].T / dim**0.5 + bias[:, g]
            weights = jax.nn.softmax(jnp.where(mask[g], logits, -jnp.inf), axis=-1)
            outs.append(weights @ v[:, g])
        x = x + jnp.concatenate(outs, -1) @ at["output"]
        gate, up = jnp.einsum("th,hnf->ntf", norm(x, at["mlp_norm"]), at["gate_up"])
        x = x + (gate * jax.nn.sigmoid(gate) * up) @ at["down"]
    logits = norm(x, params["norm"]) @ params["embed"].T
    log_p = jax.nn.log_softmax(logits[:-1])
    return jnp.take_along_axis(log_p, tokens[1:, None], -1).mean()


def named_parameters(model):
    attention, mlp = model.layers.attention, model.layers.mlp
    return {
        "embed": model.embed,
        "norm": model.norm,
        "attention_norm": model.layers.attention_norm,
        "mlp_norm": model.layers.mlp_norm,
        "qkv": attention.qkv,
        "output": attention.output,
        "A": attention.importance.A,
        "delta": attention.importance.delta,
        "gate_up": mlp.gate_up,
        "down": mlp.down,
    }


def test_gradients_equal_dense_attention_in_float64():
    """Of every parameter, A and delta included, through two rematerialised layers with the same selection."""
    config = small_config()
    model = lively_model(config)
    tokens = random_tokens(200, seed=11)
    ids = forward(model, tokens[None], record=True).block_ids

    def loss(model):
        log_p = jax.nn.log_softmax(nosa_jax.forward(model, tokens[None], block_ids=ids, remat=True).logits[0, :-1])
        return jnp.take_along_axis(log_p, tokens[1:, None], -1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(model)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(p[...]), jnp.float64) for name, p in named_parameters(model).items()}
        expected, expected_grads = jax.jit(jax.value_and_grad(dense_loss), static_argnums=1)(
            params, config, jnp.asarray(tokens), jnp.asarray(np.asarray(ids))
        )
    assert abs(float(value) - float(expected)) < 1e-5
    for name, grad in named_parameters(grads).items():
        want = np.asarray(expected_grads[name])
        error = np.abs(np.asarray(grad[...]) - want).max() / np.abs(want).max()
        assert error < 2e-4, f"{name}: relative error {error}"
        assert np.abs(want).max() > 0


@pytest.mark.slow
@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), variant=st.sampled_from(["nosa", "infllmv2", "dma"]))
def test_locality_of_random_models(seed, variant):
    """The three statements that hold for every step of every model, at any length."""
    attention = SMALL
    model = lively_model(small_config(), seed=seed % 5)
    model = nosa_jax.with_attention(model, variant=variant)
    attention = model.config.attention
    tokens = random_tokens(1, 260, seed=seed)
    ids = forward(model, tokens, record=True).block_ids  # [L, 1, K, T, J]
    positions = np.arange(260)
    for layer, (_, fill) in enumerate(_selection_scores(model, jnp.asarray(tokens), ids)):
        importance = fill[:, 0] if attention.uses_importance else jnp.zeros((2, fill.shape[-1]))
        assert locality.holds_required_blocks(ids[layer, 0], positions, importance, attention).all()
    assert locality.meets_guaranteed_overlap(ids, positions, attention).all()
    if variant == "dma":
        assert locality.unchanged_inside_block(ids, positions, attention).all()


@pytest.mark.slow
def test_biases_and_norms_of_heads():
    """Where the configuration asks for them: by hand for one token, and the same in decode as in the whole row."""
    config = dataclasses.replace(small_config(kv_heads=2, group=3), qkv_bias=True, qk_norm=True, output_bias=True)
    model = lively_model(config)
    attention, rng = model.layers.attention, np.random.default_rng(0)
    for parameter in (attention.qkv_bias, attention.query_norm, attention.key_norm, attention.output_bias):
        parameter[...] = jnp.asarray(1 + 0.5 * rng.standard_normal(parameter.shape), jnp.float32)
    assert attention.qkv_bias.shape == (2, 2, 5, 32) and attention.key_norm.shape == (2, 32)

    x = rng.standard_normal(config.hidden_size).astype(np.float32)
    layer = jax.tree.map(lambda p: np.asarray(p[1]), attention)
    ours = np.asarray(jax.tree.map(lambda p: p[1], attention).heads(config, jnp.asarray(x)))
    for head, member in np.ndindex(2, 5):
        expected = x @ layer.qkv[...][:, head, member] + layer.qkv_bias[...][head, member]
        if member < 4:  # three queries and the key
            weight = (layer.query_norm if member < 3 else layer.key_norm)[...]
            expected = expected / np.sqrt((expected**2).mean() + config.rms_norm_eps) * weight
        np.testing.assert_allclose(ours[head, member], expected, rtol=1e-5, atol=1e-5)

    merged = jax.tree.map(lambda p: p[1], attention).merge(jnp.zeros((1, 1, 6, 32)))
    np.testing.assert_array_equal(merged[0, 0], layer.output_bias[...])

    tokens = random_tokens(1, 60)
    out = forward(model, tokens)
    forced = {"forced_tokens": tokens[:, 50:], "record": True}
    gen = nosa_jax.generate(model, tokens[:, :50], max_new_tokens=10, **forced)
    np.testing.assert_allclose(gen.logits, out.logits[:, 49:59], atol=1e-4)
    assert nosa_jax.plan(config, 1, 64, dtype=jnp.float32).device["weights"] == 4 * nosa_jax.num_parameters(model)


@pytest.mark.slow
def test_with_importance_of_zero_nosa_is_infllmv2_where_all_is_selected():
    """A = 0 adds no bias; below the budget both select every block, and so does full attention."""
    model = nosa_jax.NosaLM(presets.tiny(), rngs=nnx.Rngs(0))
    tokens = random_tokens(1, 128, vocab=256)
    logits = [
        forward(nosa_jax.with_attention(model, variant=variant), tokens).logits
        for variant in ("nosa", "infllmv2", "dma", "full")
    ]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-5)


def test_with_attention_shares_parameters_and_adds_importance_where_needed():
    model = nosa_jax.NosaLM(presets.tiny("full"), rngs=nnx.Rngs(0))
    assert model.layers.attention.importance is None
    nosa = nosa_jax.with_attention(model, variant="nosa")
    assert nosa.embed[...] is model.embed[...]
    assert model.config.attention.variant == "full"
    assert not np.asarray(nosa.layers.attention.importance.A[...]).any()
    assert np.asarray(nosa.layers.attention.importance.delta[...]).any()


@pytest.mark.slow
def test_bfloat16_model_keeps_importance_and_logits_in_float32():
    model = nosa_jax.cast(lively_model(small_config()), jnp.bfloat16)
    assert model.layers.attention.importance.delta.dtype == jnp.float32
    assert model.embed.dtype == jnp.bfloat16
    tokens = random_tokens(1, 100)
    out = forward(model, tokens)
    assert out.logits.dtype == jnp.float32
    assert out.hidden.dtype == jnp.bfloat16
    state, logits = nosa_jax.prefill(model, tokens, max_length=120)
    assert state.pool.dtype == state.pooled_keys.pooled.dtype == jnp.bfloat16
    assert state.importance.dtype == state.pooled_keys.sums.dtype == jnp.float32
    exact = forward(lively_model(small_config()), tokens).logits[0, -1]
    assert np.corrcoef(np.asarray(logits[0]), np.asarray(exact))[0, 1] > 0.98


def test_logits_options():
    model = lively_model(small_config())
    tokens, lengths = random_tokens(2, 50), np.array([50, 20])
    every = forward(model, tokens, lengths)
    last = forward(model, tokens, lengths, logits="last")
    none = forward(model, tokens, lengths, logits="none")
    assert last.logits.shape == (2, 1, 128)
    np.testing.assert_allclose(last.logits[1, 0], every.logits[1, 19], atol=1e-6)
    assert none.logits is None
    np.testing.assert_array_equal(none.hidden, every.hidden)
    np.testing.assert_array_equal(model(tokens, lengths).logits.shape, every.logits.shape)


@pytest.mark.parametrize(
    ("preset", "parameters"), [(presets.nosa_1b, 1.62e9), (presets.nosa_3b, 3.61e9), (presets.nosa_8b, 8.19e9)]
)
def test_presets_have_the_released_sizes(preset, parameters):
    abstract = nnx.eval_shape(lambda: nosa_jax.NosaLM(preset(), rngs=nnx.Rngs(0)))
    assert nosa_jax.num_parameters(abstract) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_one_row_are_those_of_it_among_others(tied, monkeypatch):
    """On a GPU one row is multiplied as two: any shape of it, none and many as they are."""
    model = nosa_jax.NosaLM(dataclasses.replace(small_config(), tie_embeddings=tied), rngs=nnx.Rngs(0))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 48)), jnp.float32)
    expected = model.logits(hidden)
    multiplied = []
    by = nosa_jax.NosaLM.logits_by
    monkeypatch.setattr(
        nosa_jax.NosaLM, "logits_by", lambda self, head, x: multiplied.append(x.shape[:-1]) or by(self, head, x)
    )
    for kind, of_one in (("cpu", ()), ("gpu", (2,))):
        monkeypatch.setattr("nosa_jax.model.current_device", lambda kind=kind: Device(kind, "any"))
        for lead in ((1,), (1, 1), ()):
            found = model.logits(hidden[1].reshape(*lead, 48))
            assert found.shape == (*lead, 128) and multiplied.pop() == (*of_one, *lead)
            np.testing.assert_allclose(found.reshape(-1), expected[1], rtol=1e-6, atol=1e-6)
        for few in (hidden, hidden[:0]):
            assert model.logits(few).shape == (len(few), 128) and multiplied.pop() == (len(few),)


def test_compiled_size_does_not_grow_with_the_number_of_layers():
    """The layers are scanned: 16 of them lower to the program of 2."""

    def lowered_lines(layers):
        config = small_config(layers=layers)
        model = nnx.eval_shape(lambda: nosa_jax.NosaLM(config, rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        return jax.jit(nosa_jax.forward).lower(model, tokens).as_text().count("\n")

    assert abs(lowered_lines(16) - lowered_lines(2)) <= 10


def test_rms_norm_is_float32_inside():
    x = jnp.full((1, 4), 3e4, jnp.bfloat16)  # its square overflows half precision formats
    np.testing.assert_allclose(rms_norm(x, jnp.ones(4, jnp.bfloat16), 1e-6), jnp.ones((1, 4)))
