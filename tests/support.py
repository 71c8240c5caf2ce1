"""Models whose selections are lively, and the margins by which each selection was decided."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nosa_jax
from nosa_jax import AttentionConfig, CacheConfig, ModelConfig, NosaLM, rope
from nosa_jax.attention.layout import row_layout
from pallas_kernels import blocks, pool_keys
from pallas_kernels.block_scores.reference import block_scores_ref as block_scores

# Small budgets, so that the selection bites at short lengths.
REDUCED = AttentionConfig(num_selected_blocks=8, num_local_blocks=3, num_sink_blocks=1, num_query_blocks=1)
SMALL = AttentionConfig(
    block_size=16,
    pooling_window=8,
    pooling_stride=4,
    num_selected_blocks=8,
    num_sink_blocks=1,
    num_local_blocks=3,
    num_query_blocks=2,
)


# One ragged batch and one cache for many tests, which then share what was compiled for them.
LENGTHS = np.array([300, 128, 1])
NEW = 50  # tokens that are generated: every row crosses block boundaries
OFFLOADED = CacheConfig(slots=10)


def but_slow(cases, *slow):
    """The cases in order for `parametrize`, some of them slow: `make test` leaves those to `make test-all`."""
    return [pytest.param(case, marks=pytest.mark.slow if case in slow else ()) for case in cases]


def small_config(
    kv_heads: int = 2, group: int = 2, dim: int = 32, attention: AttentionConfig = SMALL, layers: int = 2
) -> ModelConfig:
    return ModelConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=dim,
        tie_embeddings=True,
        attention=attention,
    )


@functools.cache
def lively_model(config: ModelConfig, seed: int = 0) -> NosaLM:
    """Random weights scaled so that queries disagree, importance differs between tokens and layers matter alike.

    Logits have a standard deviation of about 2, as in a trained model.
    """
    model = NosaLM(config, rngs=nnx.Rngs(seed))
    attention = model.layers.attention
    model.embed[...] = model.embed[...] * 50 * (2 / config.hidden_size**0.5)
    attention.qkv[...] = attention.qkv[...] * 50 * (2 / config.hidden_size**0.5)
    attention.output[...] = attention.output[...] * 50 * (2 * config.num_layers) ** 0.5 / (config.num_heads * 32) ** 0.5
    if attention.importance is not None:
        key_a, key_d = jax.random.split(jax.random.key(seed + 1))
        importance = attention.importance
        importance.A[...] = jax.random.normal(key_a, importance.A.shape)
        width = config.num_kv_heads * config.head_dim
        importance.delta[...] = jax.random.normal(key_d, importance.delta.shape) / width**0.5
    return model


def random_tokens(*shape: int, seed: int = 0, vocab: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def prompts() -> np.ndarray:
    """Tokens of LENGTHS."""
    return random_tokens(len(LENGTHS), int(LENGTHS.max()), seed=2)


def sure_rows(model: NosaLM, tokens: np.ndarray, block_ids: np.ndarray, margin: float = 1e-6) -> np.ndarray:
    """Which selections of one sequence were decided by more than `margin`, [L, K, T].

    tokens [T]; block_ids [L, 1, K, T, J] as recorded. Ties are sure: they go to the lowest id, whatever the rounding.
    """
    scores = _selection_scores(model, jnp.asarray(tokens)[None], jnp.asarray(block_ids))
    return np.stack([_margins(model.config.attention, *map(np.asarray, layer)) > margin for layer in scores])


@jax.jit
def _selection_scores(model: NosaLM, tokens: jax.Array, block_ids: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Per layer the two scores that the selection compares, each [K, T, M], with the given ids replayed."""
    config, attention = model.config, model.config.attention
    layout = row_layout(tokens, None)
    num_blocks = blocks.num_blocks(tokens.shape[1], attention.block_size)
    size, stride = attention.block_size, attention.pooling_stride
    x = model.embed[...][tokens]
    scores = []
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda p, index=index: p[index], model.layers)

        def attend(attention_module, x, index=index):
            places = rope.of_positions(config, layout.rope_positions)
            q, k, _, importance = attention_module.project(config, x, *places)
            query = block_scores(
                q, pool_keys(k, stride=stride), layout.positions, num_blocks=num_blocks, block_size=size, stride=stride
            )[0]
            fill = query
            if importance is not None:
                pooled = pool_keys(importance[..., None], stride=stride)[..., 0]
                fill = blocks.pool_windows_to_blocks(pooled, None, blocks=num_blocks, ratio=size // stride)
                fill = jnp.broadcast_to(fill[0][:, None], query.shape)
            return attention_module(config, x, layout, block_ids[index])[0], (query, fill)

        x, of_layer = layer.block(config, x, attend)
        scores.append(of_layer)
    return scores


def _margins(attention: AttentionConfig, query: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """[K, T]: the smallest gap between distinct scores across a boundary of the selection; inf where none decides."""
    heads, length, width = query.shape
    own = np.arange(length) // attention.block_size
    m = np.arange(width)
    visible = m <= own[:, None]
    forced = visible & ((m < attention.num_sink_blocks) | (m > own[:, None] - attention.num_local_blocks))
    margins = np.full((heads, length), np.inf)
    two_stages = attention.variant == "nosa"
    for h, t in np.ndindex(heads, length):
        rest = [int(b) for b in np.flatnonzero(visible[t] & ~forced[t])]
        budget = attention.num_selected_blocks - int(forced[t].sum())
        stages = [(query, attention.num_query_blocks)] if two_stages else []
        for scores, count in [*stages, (fill, None)]:
            take = budget if count is None else min(count, budget)
            ranked = sorted(rest, key=lambda b: (-scores[h, t, b], b))
            if 0 < take < len(ranked):
                values = scores[h, t, ranked]
                gap = values[take - 1] - values[take]
                margins[h, t] = min(margins[h, t], gap if gap > 0 else np.inf)
            rest = [b for b in rest if b not in ranked[:take]]
            budget -= take
    return margins


def forward_one(model: NosaLM, tokens: np.ndarray, *, block_ids=None, bucket: int = 256) -> nosa_jax.ForwardOutput:
    """One sequence [T] through the jitted forward pass, selections recorded or replayed.

    Padded to a multiple of `bucket`, so that sequences of many lengths share a compilation; outputs are cut to T.
    """
    length = tokens.shape[0]
    pad = -length % bucket
    if block_ids is not None:
        block_ids = np.pad(block_ids, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1)
    out = forward(model, np.pad(tokens, (0, pad))[None], np.array([length]), block_ids=block_ids, record=True)
    ids = None if out.block_ids is None else out.block_ids[..., :length, :]
    return nosa_jax.ForwardOutput(out.logits[:, :length], out.hidden[:, :length], ids)


step = jax.jit(lambda model, state, token: nosa_jax.decode_step(model, state, token))
forward = jax.jit(nosa_jax.forward, static_argnames=("logits", "record", "remat"))
