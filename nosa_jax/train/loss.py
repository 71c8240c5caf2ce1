"""Next-token cross entropy, and its unit for bytes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Integer


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


def length_mask(lengths: Integer[Array, " B"], length: int) -> Bool[Array, "B {length}"]:
    """True for the targets inside each row: rows of `lengths[b]` input tokens, padded to `length`.

    The last input token of a padded row has no target, so `lengths[b] - 1` positions are True.
    """
    return jax.lax.broadcasted_iota(jnp.int32, (lengths.shape[0], length), 1) < lengths[:, None] - 1


def bits_per_byte(nats: float, bytes_per_token: float = 1.0) -> float:
    """A mean loss in nats per token as bits per byte of text; for bytes as tokens just nats / ln 2."""
    return nats / (math.log(2) * bytes_per_token)
