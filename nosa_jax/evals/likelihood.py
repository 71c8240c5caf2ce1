"""How likely a model finds the tokens of a text, given those before, without the logits of all positions at once."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32, Int64

from nosa_jax import parallel
from nosa_jax.attention import layout
from nosa_jax.cache.working_set import rounded
from nosa_jax.model import NosaLM, hidden_states
from nosa_jax.train.loss import cut_positions, of_all_parts, target_logits
from pallas_kernels.checks import (
    IntegersLike,
    bad_type,
    bad_value,
    is_tracing,
    require_int,
    require_shape,
    require_type,
)
from pallas_kernels.promotion import usual_promotion
from pallas_kernels.varying import axes_of

CHUNK = 2048
"""Positions, of all rows together, whose logits are made at a time unless told."""


class TokenScores(NamedTuple):
    """What `score_tokens` finds.

    log_likelihood: float32 [B, T], natural logarithm of the probability of each token given those before.
    greedy: bool [B, T], whether no other token was likelier there (of several the one with the lowest id counts).

    The first token of a row has nothing before it, and padding is no token: 0 and False.
    """

    log_likelihood: Any
    greedy: Any


def log_likelihood(
    model: NosaLM,
    tokens: IntegersLike,
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    lengths: IntegersLike | None = None,
    chunk: int = CHUNK,
) -> Float32[Array, "B T"]:
    """Log-probability in nats of every token given those before it in its row, float32 [B, T].

    model: on one device or on a mesh, any variant; it computes in the dtype of its parameters.
    tokens: int [B, T], right-padded where `lengths` says so.
    mask: bool [B, T], which elements are wanted; the others come back as 0. None wants all.
    lengths: int [B], tokens of each row; None: all T.
    chunk: positions, of all rows together, whose logits are made at a time: memory for logits is that times the size of
        the vocabulary times 4 bytes, on each device of a mesh. It changes no result.

    Element t is log p(token t | tokens 0 to t - 1), that is, `jax.nn.log_softmax(forward(...).logits)[:, t - 1]` at
    token t. Element 0 is 0, and so is padding. Outside `jax.jit` rows are padded to one of a few widths, so that
    near lengths share a program.

    Raises TypeError or ValueError for another model, wrong shapes and dtypes, a chunk below 1, and, outside `jax.jit`,
    wrong values.
    """
    found = score_tokens(model, tokens, lengths, chunk=chunk).log_likelihood
    if mask is None:
        return found
    mask = _as_mask(mask, found.shape)
    return jnp.where(mask, found, 0.0)


def score_tokens(
    model: NosaLM, tokens: IntegersLike, lengths: IntegersLike | None = None, *, chunk: int = CHUNK
) -> TokenScores:
    """`log_likelihood` of all tokens, and for each whether greedy decoding would have chosen it; see there."""
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    chunk = require_int("chunk", chunk, 1)
    tokens = layout.as_tokens(tokens, model.config.vocab_size)
    batch, length = tokens.shape
    lengths = layout.as_lengths(lengths, batch, length)
    if length == 1:
        return TokenScores(jnp.zeros((batch, 1), jnp.float32), jnp.zeros((batch, 1), bool))
    lengths = jnp.asarray(np.full(batch, length, np.int32)) if lengths is None else lengths
    # The last token predicts nothing that is asked for. So a row may be one token longer than what a model reads.
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    width = length - 1
    if is_tracing():
        found = _scores(model, inputs, targets, lengths, chunk=chunk)
    else:
        pad = ((0, 0), (0, rounded(width) - width))
        found = _compiled_scores(model, jnp.pad(inputs, pad), jnp.pad(targets, pad), lengths, chunk=chunk)
    return TokenScores(*(jnp.pad(x[:, :width], ((0, 0), (1, 0))) for x in found))


@dataclasses.dataclass(frozen=True, eq=False)
class PositionPerplexity:
    """How well text is predicted by the position in it. One entry per part of the rows that has tokens.

    starts: int64 [n], the position (tokens) where each part begins.
    nats: float64 [n], mean negative log-likelihood of the tokens there.
    counts: int64 [n], how many tokens that is the mean of.
    """

    starts: Int64[np.ndarray, " n"]
    nats: Float64[np.ndarray, " n"]
    counts: Int64[np.ndarray, " n"]

    @property
    def perplexity(self) -> Float64[np.ndarray, " n"]:
        """exp(nats)."""
        return np.exp(self.nats)


def perplexity_by_position(
    model: NosaLM,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    parts: int = 16,
    batch_size: int = 1,
    chunk: int = CHUNK,
) -> PositionPerplexity:
    """Perplexity of the tokens of long rows, by where in the row they are.

    tokens, lengths, mask, chunk: see `log_likelihood`. A text [S] is cut into rows with
        `tokens[: S // T * T].reshape(-1, T)`.
    parts: into how many equally long parts the rows are cut (less for shorter rows).
    batch_size: rows that are read together.

    Errors as in `log_likelihood`; ValueError where no token counts.
    """
    parts, batch_size = require_int("parts", parts, 1), require_int("batch_size", batch_size, 1)
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    rows = np.asarray(layout.as_tokens(tokens, model.config.vocab_size))
    batch, length = rows.shape
    sizes = layout.as_lengths(lengths, batch, length)
    ends = np.full(batch, length) if sizes is None else np.asarray(sizes)
    place = np.arange(length)
    counted = (place > 0) & (place < ends[:, None])
    if mask is not None:
        counted &= np.asarray(_as_mask(mask, rows.shape))
    if not counted.any():
        raise bad_value(
            "tokens", "must hold tokens that count, beside the first of each row", "none", "Check the mask."
        )
    found = []
    for begin in range(0, batch, batch_size):
        group = np.minimum(np.arange(begin, begin + batch_size), batch - 1)  # full groups share a program
        scores = log_likelihood(model, rows[group], lengths=ends[group].astype(np.int32), chunk=chunk)
        found.append(np.asarray(scores, np.float64)[: batch - begin])
    nats = np.where(counted, -np.concatenate(found), 0.0).sum(0)
    starts = np.unique(np.linspace(0, length, parts, endpoint=False).astype(int))
    sums, counts = np.add.reduceat(nats, starts), np.add.reduceat(counted.sum(0), starts)
    seen = counts > 0
    return PositionPerplexity(starts[seen], sums[seen] / counts[seen], counts[seen])


def _as_mask(mask: Any, shape: tuple[int, ...]) -> Bool[Array, "B T"]:
    mask = jnp.asarray(mask)
    require_shape("mask", mask, shape, "[B, T]")
    if mask.dtype != bool:
        raise bad_type("mask", "must hold bools", mask.dtype, "Pass mask > 0, for example.")
    return mask


@usual_promotion
def _scores(
    model: NosaLM,
    inputs: Int32[Array, "B T"],
    targets: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    *,
    chunk: int,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """Of each target its log-likelihood and whether it is the likeliest. lengths: of rows with their last target."""

    def of_device(head: Any, hidden: Any, targets: Any) -> tuple[Array, Array]:
        cut = "tensor" if "tensor" in axes_of(head) else None
        return _in_chunks(partial(model.logits_by, head), hidden, targets, chunk, cut)

    def body(model: NosaLM, inputs: Array, targets: Array, lengths: Array) -> tuple[Array, Array]:
        # What has no target is no token here, so a row of one token reads one that counts for nothing.
        hidden, _ = hidden_states(model, inputs, jnp.maximum(lengths - 1, 1), None)
        found = parallel.per_row_and_head(
            of_device,
            (model.head(), hidden, parallel.in_query_order(targets, 1)),
            (".." if model.lm_head is None else ".v", "bt.", "bt"),
            ("bt", "bt"),
        )
        likely, greedy = (parallel.in_row_order(x, 1) for x in found)
        inside = jnp.arange(inputs.shape[1]) < lengths[:, None] - 1
        return jnp.where(inside, likely, 0.0), greedy & inside

    rows = PartitionSpec(parallel.rows_of(inputs))
    mesh = parallel.mesh_of(model, inputs)
    return parallel.run(mesh, body, model, inputs, targets, lengths, out=(rows, rows))


_compiled_scores = jax.jit(_scores, static_argnames="chunk")


def _in_chunks(
    model_logits: Any, hidden: Float[Array, "B T H"], targets: Int32[Array, "B T"], chunk: int, vocab_axis: str | None
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """`_scores` of hidden states. vocab_axis: the mesh axis that `model_logits` makes this device's part along."""
    batch, length = targets.shape
    chunk = min(max(1, chunk // batch), length)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = inputs
        logits = model_logits(hidden).astype(jnp.float32)
        own, normalizer = target_logits(logits, targets, vocab_axis), jax.nn.logsumexp(logits, axis=-1)
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        if vocab_axis is not None:
            normalizer, own = of_all_parts(normalizer, own, vocab_axis)
            ids += logits.shape[-1] * jax.lax.axis_index(vocab_axis)
        ahead = (logits > own[..., None]) | ((logits == own[..., None]) & (ids < targets[..., None]))
        beaten = ahead.any(-1)
        if vocab_axis is not None:
            beaten = jax.lax.psum(beaten.astype(jnp.int32), vocab_axis) > 0
        return own - normalizer, ~beaten

    if chunk == length:
        return one((hidden, targets))
    likely, greedy = jax.lax.map(one, (cut_positions(hidden, chunk), cut_positions(targets, chunk)))
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]
    return whole(likely), whole(greedy)
