"""Gradients of a batch in parts, for less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nosa_jax.train.loss import LossParts
from pallas_kernels.checks import bad_value, require_int

LossAndGrad = Callable[[Any], tuple[tuple[Any, LossParts], Any]]


def accumulate(loss_and_grad: LossAndGrad, batch: Any, parts: int) -> tuple[tuple[Any, LossParts], Any]:
    """`loss_and_grad(batch)` from so many parts of the batch, one after the other: the same up to rounding.

    loss_and_grad: from a batch to ((loss, sums), gradients), as `jax.value_and_grad(..., has_aux=True)` of a function
        that returns what `chunked_loss` does, a mean over the targets that count.
    batch: a pytree of arrays [B, ...]; None where there is nothing.
    parts: how many; divides B.

    Each part weighs as much as it has targets that count, and sums are float32: also where parts have masks of their
    own the result is the mean over all targets. Part i takes the rows i, i + parts, i + 2 parts, ... So where rows are
    split over devices each device has its share of every part, and no row moves, as long as `parts` divides the rows
    of one device.
    Raises ValueError when `parts` does not divide B.
    """
    require_int("accumulate", parts, 1)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise bad_value("accumulate", f"must divide the batch size {rows}", parts, "Change one.")
    if parts == 1:
        return loss_and_grad(batch)

    def weighed(part: Any) -> Any:
        (loss, sums), grads = loss_and_grad(part)
        weight = sums.count.astype(jnp.float32)
        return (loss * weight, sums), jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * weight, grads)

    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    shapes = jax.eval_shape(weighed, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, weighed(part)), None)
    ((loss, sums), grads), _ = jax.lax.scan(add, zeros, cut)
    count = jnp.maximum(sums.count, 1).astype(jnp.float32)
    return (loss / count, sums), jax.tree.map(lambda leaf: leaf / count, grads)
