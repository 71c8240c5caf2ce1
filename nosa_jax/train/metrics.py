"""Numbers about parameters and gradients, for logs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from nosa_jax._pytree import by_name
from nosa_jax.train.patterns import first_match

# The first pattern that matches a name says which group a parameter is of.
GROUPS = (
    ("*importance*", "importance"),
    ("*norm", "norm"),
    ("*attention*", "attention"),
    ("*mlp*", "mlp"),
    ("embed", "embedding"),
    ("lm_head", "embedding"),
)


def norms_by_group(tree: Any) -> dict[str, Float32[Array, ""]]:
    """Euclidean norms of a model, its gradients or its updates, by group of parameters.

    tree: a NosaLM, or a part of one. Groups are `importance`, `norm` (of RMS norms), `attention`, `mlp` and `embedding`
    (input and output), and `other` for names of none of them; only those that `tree` has come back. The norm of all is
    the square root of the sum of their squares.
    """
    squares: dict[str, Any] = {}
    for name, leaf in by_name(tree).items():
        group = first_match(GROUPS, name, "other")
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def global_norm(tree: Any) -> Float32[Array, ""]:
    """Euclidean norm of all arrays together, summed in float32; 0 without any."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
