"""Steps whose loss or gradient is not finite: they leave everything as it was, but are counted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nosa_jax._pytree import pytree_dataclass


@pytree_dataclass
class Skipped:
    """How many steps changed nothing. total, in_a_row: int32 scalars; the second one counts those right before now."""

    total: Any
    in_a_row: Any

    @classmethod
    def none(cls) -> Skipped:
        """No step yet."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def keep_if_finite[Tree](
    skipped: Skipped, old: Tree, new: Tree, *scalars: Float[Array, ""]
) -> tuple[Tree, Skipped, Bool[Array, ""]]:
    """`new` where all scalars are finite, otherwise `old` to the bit.

    skipped: the counts so far.
    old, new: pytrees of one structure, before and after the step: the model's part that trains and the optimizer's
        state.
    scalars: the loss and the gradients' norm before clipping. A norm is finite only where every gradient is.

    Returns the tree, the new counts, and whether the step was made. Works under `jax.jit` without the host. A select
    per array and not `lax.cond`: it joins the update's own pass over the arrays, in place where they are donated, while
    a branch would make the host wait for the flag on a GPU.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(scalar) for scalar in scalars]))
    kept = jax.tree.map(lambda before, after: jnp.where(finite, after, before), old, new)
    missed = 1 - finite.astype(jnp.int32)
    return kept, Skipped(skipped.total + missed, (skipped.in_a_row + 1) * missed), finite
