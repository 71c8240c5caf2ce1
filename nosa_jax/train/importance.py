"""A start for the importance head that is fitted, not trained: what far queries of the dense model attend to."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32

from nosa_jax import parallel, rope
from nosa_jax.attention.dense import dense_attention
from nosa_jax.attention.importance import Importance
from nosa_jax.attention.layout import Layout, packed_layout, row_layout
from nosa_jax.config import AttentionConfig
from nosa_jax.convert import with_attention
from nosa_jax.model import Layers, NosaLM
from nosa_jax.train.data import Source, check_blocks, check_vocabulary
from pallas_kernels.checks import bad_value, require_int, require_number, require_size, require_type
from pallas_kernels.promotion import usual_promotion

_LEAST_MASS = 1e-6  # what was never attended to has no logarithm


@dataclasses.dataclass(frozen=True)
class ImportanceFit:
    """How well importance was fitted.

    r2: float64 [L, K], share of the variance of the log mass that the fit explains in the last batch, which it has not
        seen, by layer and KV head; NaN where the mass does not vary.
    tokens, checked_tokens: how many tokens were fitted, and how many `r2` is of.
    """

    r2: Float64[np.ndarray, "L K"]
    tokens: int
    checked_tokens: int


def fit_importance(
    model: NosaLM,
    source: Source,
    *,
    batches: int = 8,
    batch_size: int = 1,
    seed: int = 0,
    chunk: int = 128,
    ridge: float = 1e-3,
    scale: float = 1e-4,
) -> tuple[NosaLM, ImportanceFit]:
    """The model with A and delta such that tokens matter by the attention that they get from afar, and how well.

    The importance of a token is A softplus(v delta) (paper section 3.3), v being its values in all KV heads. Here
    delta [L, K, D, K] comes from ridge regression, and A is `scale` everywhere. This start is an idea of this project,
    not of the paper, whose A begins at 0, so that the first steps of training decide which tokens matter.

    In the dense model, that is, the same weights as `full`, the far mass of token s for KV head h is

        m[h, s] = mean over queries t beyond the local window of  n[t] * sum over heads g of h of  p[g, t, s]

    where p are the probabilities of dense attention, n[t] counts the tokens that query t sees, so that 1 per head means
    as much as the average token gets, and "beyond" are queries whose block comes `num_local_blocks` or more after that
    of s in the same document. Then v delta is the best linear fit of log m[h] up to a constant: a constant changes no
    order, softplus keeps the order, and so blocks are selected by the mass that their tokens are expected to get.
    Tokens in sink blocks, which are always selected, and those with fewer than `block_size` far queries are left out.

    model: of any variant; what the sizes of its attention say decides which queries are far: set them first, by
        `with_attention(model, num_local_blocks=9)`. On one device.
    source: rows long enough to have far queries, of training text. Packed documents are seen one by one.
    batches: how many to read, in the order of `seed`, 2 or more; the last one is for `ImportanceFit.r2` alone.
    batch_size: rows of each.
    chunk: queries of each row that are computed together: probabilities take batch_size * N * chunk * T * 4 bytes. It
        changes no result but for rounding.
    ridge: of the regression, in units of the mean variance of a value.
    scale: A. Small, attention itself hardly changes, while the order of selection is that of the fit.

    Returns a new model, of the variant "nosa" where the given one is without importance, that shares all other
    parameters with it; the given one is left as it is. Raises TypeError or ValueError for arguments out of range, a
    model on a mesh, ids out of the vocabulary, documents packed for other blocks, and rows in which no query is far;
    FloatingPointError where the model computes NaN or infinities.
    """
    require_type("model", model, NosaLM, "See nosa_jax.from_pretrained and train.load_model.")
    require_type("source", source, Source, "Make one with train.text, tokens, jsonl or chat.")
    batches, batch_size = require_int("batches", batches, 2), require_int("batch_size", batch_size, 1)
    seed, chunk = require_size("seed", seed, 0, 2**32 - 1), require_int("chunk", chunk, 1)
    ridge, scale = require_number("ridge", ridge, 1e-12), require_number("scale", scale, 0.0)
    if parallel.mesh_of(model) is not None:
        remedy = "Fit before parallel.shard, or load it without mesh=."
        raise bad_value("model", "must lie on one device", "one on a mesh", remedy)
    check_vocabulary(source, model.config.vocab_size)
    attention = model.config.attention
    check_blocks(source, attention.block_size)
    _require_far_queries(attention, source.length)

    dense = with_attention(model, variant="full")
    read = itertools.islice(source.batches(batch_size, seed), batches)
    parts = [_moments(dense, batch.tokens, batch.segment_ids, chunk=chunk) for batch in read]
    *fitted, checked = (Moments(*(np.asarray(x, np.float64) for x in part)) for part in parts)
    whole = merged(fitted)
    kv_heads, dim = model.config.num_kv_heads, model.config.head_dim
    for name, moments in (("fitted", whole), ("checked", checked)):
        if not all(np.isfinite(part).all() for part in moments):
            raise FloatingPointError(
                f"model: must compute finite values and attention, got others in the {name} batches. "
                "Look for NaN in its weights."
            )
        if moments.count[0] < 2:
            remedy = "Take longer documents, more batches, or a smaller num_local_blocks."
            raise bad_value("source", f"must give {name} batches with tokens that are far from queries", "none", remedy)
    weights, constant = regression(whole, kv_heads, ridge)
    report = ImportanceFit(
        r2=explained(checked, weights, constant), tokens=int(whole.count[0]), checked_tokens=int(checked.count[0])
    )
    variant = attention.variant if attention.uses_importance else "nosa"
    layers = model.config.num_layers
    A = jnp.full((layers, kv_heads), scale, jnp.float32)
    delta = jnp.asarray(weights.reshape(layers, kv_heads, dim, kv_heads), jnp.float32)
    return with_importance(with_attention(model, variant=variant), A, delta), report


def with_importance(model: NosaLM, A: Float[Array, "L K"], delta: Float[Array, "L K D K"]) -> NosaLM:
    """The model with these A and delta; all other parameters are shared with it, and it is left as it is."""
    config, changed = model.config, with_attention(model)
    importance = Importance(config.num_layers, config.num_kv_heads, config.head_dim, rngs=nnx.Rngs(0))
    importance.A[...], importance.delta[...] = A, delta
    changed.layers.attention.importance = nnx.data(importance)
    return changed


def _require_far_queries(attention: AttentionConfig, length: int) -> None:
    """Raises ValueError for rows in which no token outside the sink has `block_size` far queries."""
    least = (attention.num_sink_blocks + attention.num_local_blocks + 1) * attention.block_size
    if length < least:
        rule = f"must have rows of at least {least} tokens, those of the sink, the local window and a block beyond"
        raise bad_value("source", rule, length, "Make it with a larger length, or lower num_local_blocks.")


class Moments(NamedTuple):
    """Of the values and log masses of tokens, side by side, by layer: how many [L], their mean [L, K D + K], and the
    sums of products about it [L, K D + K, K D + K]."""

    count: Any
    mean: Any
    scatter: Any


def moments_of(x: Float[Array, "*rows F"], valid: Bool[Array, "*rows"]) -> Moments:
    """Of one layer's tokens, those that are valid."""
    x = jnp.where(valid[..., None], x, 0).reshape(-1, x.shape[-1])
    count = valid.sum()
    mean = x.sum(0) / jnp.maximum(count, 1)
    about = jnp.where(valid.reshape(-1, 1), x - mean, 0)
    return Moments(count, mean, jnp.matmul(about.T, about, precision="highest"))


def merged(parts: list[Moments]) -> Moments:
    """The moments of all tokens together."""
    count = sum(part.count for part in parts)
    mean = sum(part.count[:, None] * part.mean for part in parts) / np.maximum(count, 1)[:, None]
    scatter = sum(
        part.scatter + part.count[:, None, None] * np.einsum("li,lj->lij", part.mean - mean, part.mean - mean)
        for part in parts
    )
    return Moments(count, mean, scatter)


def regression(
    moments: Moments, targets: int, ridge: float
) -> tuple[Float64[np.ndarray, "L F K"], Float64[np.ndarray, "L K"]]:
    """Weights of the first numbers for the last `targets` ones, and the constants, by layer."""
    scatter, cross = moments.scatter[:, :-targets, :-targets], moments.scatter[:, :-targets, -targets:]
    size = scatter.shape[-1]
    strength = ridge * np.trace(scatter, axis1=1, axis2=2)[:, None, None] / size
    # Values that do not vary at all explain nothing: the tiny number keeps their equations solvable.
    weights = np.linalg.solve(scatter + np.maximum(strength, 1e-30) * np.eye(size), cross)
    constant = moments.mean[:, -targets:] - np.einsum("lf,lfk->lk", moments.mean[:, :-targets], weights)
    return weights, constant


def explained(
    moments: Moments, weights: Float64[np.ndarray, "L F K"], constant: Float64[np.ndarray, "L K"]
) -> Float64[np.ndarray, "L K"]:
    """R^2 of a fit on tokens with these moments; NaN where the target does not vary."""
    targets = weights.shape[-1]
    eye = np.broadcast_to(np.eye(targets), (len(weights), targets, targets))
    error = np.concatenate([-weights, eye], axis=1)  # from the numbers side by side to target less fit
    bias = np.einsum("lf,lfk->lk", moments.mean, error) - constant
    squares = np.einsum("lfk,lfg,lgk->lk", error, moments.scatter, error) + moments.count[:, None] * bias**2
    total = np.diagonal(moments.scatter, axis1=1, axis2=2)[:, -targets:]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, 1 - squares / total, np.nan)


@partial(jax.jit, static_argnames="chunk")
@usual_promotion
def _moments(
    model: NosaLM, tokens: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"] | None, *, chunk: int
) -> Moments:
    """The moments of every layer of a `full` model."""
    config = model.config
    attention = config.attention
    rows = row_layout(tokens, None)
    if segment_ids is not None:
        rows = packed_layout(segment_ids, None, attention.block_size)
    cos, sin = rope.of_positions(config, rows.rope_positions)

    def run_layer(x: Array, layer: Layers) -> tuple[Array, Moments]:
        def attend(part: Any, x: Array) -> tuple[Array, Moments]:
            q, k, v, _ = part.project(config, x, cos, sin)
            mass, queries = far_mass(q, k, rows, attention, chunk)
            values = jnp.moveaxis(v, 1, 2).reshape(*tokens.shape, -1).astype(jnp.float32)
            targets = jnp.moveaxis(jnp.log(jnp.maximum(mass, _LEAST_MASS)), 1, 2)
            in_sink = rows.rope_positions < attention.num_sink_blocks * attention.block_size
            valid = (rows.positions >= 0) & ~in_sink & (queries >= attention.block_size)
            found = moments_of(jnp.concatenate([values, targets], axis=-1), valid)
            return part.merge(dense_attention(q, k, v, rows, attention.block_size)), found

        return layer.block(config, x, attend)

    return jax.lax.scan(run_layer, model.embedded(tokens), model.layers)[1]


def far_mass(
    q: Float[Array, "B T N D"], k: Float[Array, "B K T D"], rows: Layout, attention: AttentionConfig, chunk: int
) -> tuple[Float32[Array, "B K T"], Int32[Array, "B T"]]:
    """The far mass of every token, as `fit_importance` defines it, and how many queries are far from it.

    chunk: queries whose probabilities are held at once.
    """
    batch, kv_heads, length, dim = k.shape
    place = jnp.arange(length, dtype=jnp.int32)
    first = jnp.zeros((batch, length), jnp.int32)
    if rows.first_block is not None:
        first = jnp.repeat(rows.first_block, attention.block_size, axis=1)[:, :length]

    def of_chunk(sums: tuple[Array, Array], queries: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        q, positions, seen_tokens, first_of_query = queries
        real = (positions >= 0)[..., None] & (rows.positions >= 0)[:, None]
        visible = real & (first_of_query[..., None] == first[:, None]) & (place <= positions[..., None])
        blocks_before = positions[..., None] // attention.block_size - place // attention.block_size
        far = visible & (blocks_before >= attention.num_local_blocks)
        scores = jnp.einsum("bckgd,bksd->bkgcs", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        scores = jnp.where(visible[:, None, None], scores, -1e30)  # finite: padding sees nothing
        weights = jnp.where(far, seen_tokens[..., None], 0).astype(jnp.float32)
        mass = jnp.einsum("bkgcs,bcs->bks", jax.nn.softmax(scores), weights)
        return (sums[0] + mass, sums[1] + far.sum(1, dtype=jnp.int32)), None

    chunk = min(chunk, length)
    pad = -length % chunk
    grouped = q.reshape(batch, length, kv_heads, -1, dim)

    def cut(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    queries = (cut(grouped), cut(rows.positions, -1), cut(rows.rope_positions + 1), cut(first))
    zero = jnp.zeros((batch, kv_heads, length), jnp.float32), jnp.zeros((batch, length), jnp.int32)
    (mass, count), _ = jax.lax.scan(of_chunk, zero, queries)
    return mass / jnp.maximum(count, 1)[:, None], count
