"""Next-token cross entropy, whole or in chunks, and its unit for bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer

from nosa_jax._pytree import pytree_dataclass
from pallas_kernels.checks import require_int, require_number

CHUNK_LOGITS = 2**26
"""How many logits `chunked_loss` makes at a time on each device unless told: 256 MiB."""


def next_token_loss(
    logits: Float[Array, "B T V"], targets: Integer[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> tuple[Float[Array, ""], Integer[Array, ""]]:
    """Mean cross entropy in nats (float32) and the number of targets it is taken over (int32).

    `logits[b, t]` scores `targets[b, t]`, that is, `tokens[b, t + 1]`. Targets where `mask` is False do not count;
    with none left the loss is 0.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    if mask is None:
        return losses.mean(), jnp.int32(targets.size)
    count = mask.sum(dtype=jnp.int32)
    # `where` and not a product: a padded position may hold anything, NaN included.
    return jnp.where(mask, losses, 0.0).sum() / jnp.maximum(count, 1), count


@pytree_dataclass
class LossParts:
    """Sums that a loss is made of, by position in the row. Those of parts of a batch, or of devices, add up.

    nats: float32 [T], cross entropy of the targets that count, in nats.
    squares: float32 [T], squared logarithms of the softmax's denominators there.
    counts: int32 [T], how many targets count.
    """

    nats: Any
    squares: Any
    counts: Any

    @property
    def count(self) -> Int32[Array, ""]:
        """How many targets count in all."""
        return self.counts.sum(dtype=jnp.int32)

    def cross_entropy(self) -> Float32[Array, ""]:
        """Mean nats per target; 0 without any."""
        return self.nats.sum() / jnp.maximum(self.count, 1)

    def loss(self, z_loss: float = 0.0) -> Float32[Array, ""]:
        """Mean nats plus `z_loss` times the mean square: what is minimised."""
        if z_loss == 0:
            return self.cross_entropy()
        return self.cross_entropy() + z_loss * (self.squares.sum() / jnp.maximum(self.count, 1))


def chunked_loss(
    model_logits: Callable[[Any], Any],
    hidden: Float[Array, "B T H"],
    targets: Integer[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    vocab_axis: str | None = None,
) -> tuple[Float32[Array, ""], LossParts]:
    """The loss of `next_token_loss` from hidden states, without the logits of all positions at once.

    model_logits: from hidden states [B, c, H] to float32 logits [B, c, V]: `NosaLM.logits`, for example.
    hidden: after the final norm, `forward(..., logits="none").hidden`.
    targets: `targets[b, t]` is the token after `tokens[b, t]`.
    mask: targets where it is False do not count, and `hidden` may hold anything there.
    chunk: positions of every row whose logits are made together, and once more in the backward pass; None takes so
        many that there are at most `CHUNK_LOGITS`, on each device of a mesh. Where one chunk holds them all, its logits
        are kept.
    z_loss: weight of the mean squared logarithm of the softmax's denominator, which keeps logits from drifting.
    vocab_axis: inside `jax.shard_map`, the mesh axis that the vocabulary is cut along: `model_logits` makes this
        device's part of it. Devices meet once, after all chunks. None where logits are of the whole vocabulary.

    Returns what is minimised (float32, 0 where nothing counts) and its sums. Chunks are cut along T, so that rows may
    lie on different devices. Gradients of the parameters in `model_logits` are summed over the chunks in float32,
    whatever their dtype.
    Raises TypeError or ValueError for a chunk below 1 and for a negative weight.
    """
    z_loss = require_number("z_loss", z_loss, 0.0, 1.0)
    batch, length = targets.shape
    if chunk is None:
        vocab = jax.eval_shape(model_logits, hidden[:, :1]).shape[-1]
        chunk = _even_chunk(length, CHUNK_LOGITS // (batch * vocab))
    chunk = min(require_int("chunk", chunk, 1), length)
    if mask is None:
        mask = jnp.ones(targets.shape, bool)
    found: Any
    if chunk == length:
        found = _normalizers(model_logits, vocab_axis, hidden, targets, mask)
    else:
        pure_logits, parameters = _as_float32(model_logits, hidden[:, :chunk])
        one = jax.checkpoint(
            lambda parameters, *inputs: _normalizers(lambda x: pure_logits(x, parameters), vocab_axis, *inputs)
        )
        inputs = [cut_positions(x, chunk) for x in (hidden, targets, mask)]
        _, found = jax.lax.scan(lambda _, inputs: (None, one(parameters, *inputs)), None, inputs)
        found = tuple(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in found)
    normalizers, logits = found if vocab_axis is None else of_all_parts(found[0], found[1], vocab_axis)
    losses = jnp.where(mask, normalizers - logits, 0.0)
    squares = jnp.where(mask, jnp.square(normalizers), 0.0)
    # Summed over rows here, not chunk by chunk: devices that share the rows then need not meet at every chunk.
    parts = LossParts(losses.sum(0), squares.sum(0), mask.sum(0, dtype=jnp.int32))
    return parts.loss(z_loss), parts


def cut_positions(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], padded with zeros."""
    chunks = -(-x.shape[1] // chunk)
    padding = [(0, 0), (0, chunks * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.moveaxis(jnp.pad(x, padding).reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)


def _normalizers(
    model_logits: Callable[[Any], Any],
    vocab_axis: str | None,
    hidden: Float[Array, "B T H"],
    targets: Integer[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """The logarithm of the softmax's denominator, and the logit of each target; of a part of the vocabulary, its share
    of the one and 0 for targets of other parts."""
    # Zeros, and not what is there: a gradient of zero times NaN would be NaN.
    logits = model_logits(jnp.where(mask[..., None], hidden, 0)).astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1), target_logits(logits, targets, vocab_axis)


def target_logits(
    logits: Float32[Array, "B T V"], targets: Integer[Array, "B T"], vocab_axis: str | None
) -> Float32[Array, "B T"]:
    """The logit of each target; of a part of the vocabulary, 0 for targets of other parts."""
    here = targets.astype(jnp.int32)
    if vocab_axis is None:
        return jnp.take_along_axis(logits, here[..., None], -1)[..., 0]
    size = logits.shape[-1]
    here -= size * jax.lax.axis_index(vocab_axis)
    own = jnp.take_along_axis(logits, jnp.clip(here, 0, size - 1)[..., None], -1)[..., 0]
    return jnp.where((here >= 0) & (here < size), own, 0.0)


def of_all_parts(
    normalizers: Float32[Array, "B T"], logits: Float32[Array, "B T"], vocab_axis: str
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """Those of the whole vocabulary, from those of the parts that devices have along a mesh axis."""
    top = jax.lax.pmax(jax.lax.stop_gradient(normalizers), vocab_axis)
    total, logits = jax.lax.psum((jnp.exp(normalizers - top), logits), vocab_axis)
    return top + jnp.log(total), logits


def _as_float32(model_logits: Callable[[Any], Any], hidden: Array) -> tuple[Callable[[Any, Any], Any], list[Array]]:
    """`model_logits` as a function of what it closes over, too, and that in float32.

    The backward pass of a scan adds up the gradients of what every chunk uses, in the dtype of what is handed in. In
    bfloat16 each of many small additions would round.
    """
    pure, closed_over = jax.closure_convert(model_logits, hidden)
    dtypes = [x.dtype for x in closed_over]
    back = lambda parameters: [x.astype(dtype) for x, dtype in zip(parameters, dtypes, strict=True)]
    return lambda hidden, parameters: pure(hidden, *back(parameters)), [x.astype(jnp.float32) for x in closed_over]


def _even_chunk(length: int, most: int) -> int:
    """A chunk of at most `most` positions, so that chunks are about equally long; multiples of 8 where that allows."""
    most = max(most, 1)
    if length <= most:
        return length
    step = 8 if most >= 8 else 1
    most -= most % step
    even = -(-length // -(-length // most))
    return -(-even // step) * step


def length_mask(lengths: Integer[Array, " B"], length: int) -> Bool[Array, "B {length}"]:
    """True for the targets inside each row: rows of `lengths[b]` input tokens, padded to `length`.

    The last input token of a padded row has no target, so `lengths[b] - 1` positions are True.
    """
    return jax.lax.broadcasted_iota(jnp.int32, (lengths.shape[0], length), 1) < lengths[:, None] - 1


def bits_per_byte(nats: float, bytes_per_token: float = 1.0) -> float:
    """A mean loss in nats per token as bits per byte of text; for bytes as tokens just nats / ln 2."""
    return nats / (math.log(2) * bytes_per_token)
