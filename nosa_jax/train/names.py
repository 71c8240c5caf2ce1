"""Arrays of a pytree by dotted name, such as `layers.attention.qkv`."""

from __future__ import annotations

from typing import Any

import jax


def name_of(path: tuple[Any, ...]) -> str:
    """The dotted name of a key path of `jax.tree`, e.g. `layers.attention.importance.A`."""
    # `.value` is where NNX keeps a parameter's array: no part of its name.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, in the order of `jax.tree.leaves`."""
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
