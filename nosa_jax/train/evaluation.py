"""Loss on held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from nosa_jax.model import cast
from nosa_jax.train.data import Batch, heldout_batches
from nosa_jax.train.loss import LossParts, bits_per_byte
from nosa_jax.train.step import batch_loss, token_loss

_batch_loss = jax.jit(batch_loss, static_argnames="compute_dtype")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per token; bits_per_byte: the same per byte of text; tokens: how many were predicted."""

    loss: float
    bits_per_byte: float
    tokens: int


def evaluate(
    model: Any,
    tokens: Integer[np.ndarray, " S"],
    *,
    batch_size: int,
    length: int,
    max_batches: int = 16,
    bytes_per_token: float = 1.0,
    compute_dtype: Any = "float32",
) -> Evaluation:
    """Next-token loss over windows of the text, the same ones at every call.

    model: what is evaluated.
    tokens: of the text, on the host.
    batch_size: windows that are computed together.
    length: tokens of a window that are predicted.
    max_batches: batches that are read, at most.
    bytes_per_token: of the text, on average, for `bits_per_byte`.
    compute_dtype: of the forward pass.

    Raises ValueError when the text is shorter than one window.
    """
    losses, predicted = [], 0
    for batch in heldout_batches(tokens, batch_size=batch_size, length=length, max_batches=max_batches):
        losses.append(_batch_loss(model, batch, compute_dtype=compute_dtype))
        predicted += batch[:, 1:].size
    loss = float(jnp.stack(losses).mean())  # all batches have one size
    return Evaluation(loss, bits_per_byte(loss, bytes_per_token), predicted)


def evaluate_batches(
    model: Any, batches: Iterable[Batch], *, bytes_per_token: float = 1.0, compute_dtype: Any = "float32"
) -> Evaluation | None:
    """Mean loss over the targets of batches; None where there are none."""
    total = None
    for batch in batches:
        parts = _batch_parts(model, batch, compute_dtype=compute_dtype)
        total = parts if total is None else jax.tree.map(jnp.add, total, parts)
    if total is None:
        return None
    loss = float(total.cross_entropy())
    return Evaluation(loss, bits_per_byte(loss, bytes_per_token), int(total.count))


@partial(jax.jit, static_argnames="compute_dtype")
def _batch_parts(model: Any, batch: Batch, *, compute_dtype: Any) -> LossParts:
    return token_loss(cast(model, compute_dtype), batch)[1]
