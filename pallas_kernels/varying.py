"""Which axes of a mesh a value varies over, as `jax.shard_map` checks it: a loop's carry, a kernel's result and the
cotangents of a `custom_vjp` must say so. Outside `shard_map` nothing varies, and all of this does nothing."""

from __future__ import annotations

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset[str]:
    """The mesh axes that any array in `tree` varies over."""
    return frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def _axes(x: Any) -> frozenset[str]:
    if not isinstance(x, jax.Array):
        return frozenset()
    return jax.typeof(x).manual_axis_type.varying


def varying[Tree](tree: Tree, axes: frozenset[str]) -> Tree:
    """`tree` with every array varying over `axes`, too; what is no array stays.

    The transpose sums over the axes that were added, as a value that all devices share asks for.
    """

    def cast(x: Any) -> Any:
        missing = axes - _axes(x)
        if not missing or not isinstance(x, jax.Array):
            return x
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying")

    return jax.tree.map(cast, tree) if axes else tree


def alike[Tree](tree: Tree) -> Tree:
    """`tree` with every array varying over the axes that any of them does."""
    return varying(tree, axes_of(tree))


def struct(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over `axes`."""
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
