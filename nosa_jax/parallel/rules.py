"""What is cut along which axis: the one table, and weights that lie so, gathered for products."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from nosa_jax._pytree import name_of
from nosa_jax.parallel.mesh import current, require_axes, size_of
from pallas_kernels.checks import bad_value

# The last names of a parameter, and the mesh axis of each of its dimensions; what is not named here is copied whole.
RULES: tuple[tuple[str, P], ...] = (
    ("embed", P(None, "fsdp")),
    ("lm_head", P("fsdp", "tensor")),
    ("attention.qkv", P(None, "fsdp", "tensor", None, None)),
    ("attention.qkv_bias", P(None, "tensor", None, None)),
    ("attention.output", P(None, "tensor", "fsdp")),
    ("importance.delta", P(None, "tensor", None, None)),
    ("mlp.gate_up", P(None, "fsdp", None, "tensor")),
    ("mlp.down", P(None, "tensor", "fsdp")),
)


def _rule(name: str) -> P:
    return next((rule for last, rule in RULES if name == last or name.endswith(f".{last}")), P())


def spec(name: str, mesh: Mesh | AbstractMesh) -> P:
    """How the parameter of a dotted name, or its moments in an optimizer's state, lie on a mesh.

    As JAX writes it: without axes of one device and without None at the end, so that what comes out of a program is of
    the type of what went in.
    """
    axes = [axis if mesh.shape.get(axis, 1) > 1 else None for axis in _rule(name)]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def specs(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`spec` for every leaf of a pytree, by its name; P() for one of another rank than the parameter of that name, as
    the factors of moments that some optimizers keep."""

    def of_leaf(path: Any, leaf: Any) -> P:
        name = name_of(path)
        return spec(name, mesh) if np.ndim(leaf) == len(_rule(name)) else P()

    return jax.tree.map_with_path(of_leaf, tree)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings for the leaves of a model, of an optimizer's state or of anything that holds them.

    Raises ValueError where a mesh has other axes than ours, or does not divide what it cuts; all such are listed.
    """
    require_axes(mesh)
    misfits = []

    def place(path: Any, leaf: Any, wanted: P) -> NamedSharding:
        for size, axes in zip(np.shape(leaf), wanted, strict=False):
            parts = size_of(mesh, axes)
            if size % parts:
                nearest = max(n for n in range(1, parts) if size % n == 0)
                misfits.append(f"{name_of(path)}: {size} by {axes}={parts} (nearest: {nearest})")
        return NamedSharding(mesh, wanted)

    placed = jax.tree.map_with_path(place, tree, specs(tree, mesh))
    if misfits:
        raise bad_value("mesh", "must divide what it cuts", "; ".join(misfits), "Change the sizes of the mesh.")
    return placed


def shard[Tree](tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """`tree`, a model or a training state, on the devices of `mesh`, cut as RULES says.

    Shapes (`jax.ShapeDtypeStruct`) get their sharding and stay shapes, also on an AbstractMesh. Raises ValueError as
    `shardings` does.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree, shardings(tree, mesh))


def from_host(array: np.ndarray, sharding: NamedSharding, *, first: int = 0, rows: int | None = None) -> Array:
    """An array on the devices of a mesh, each with its part, from what this process holds of it.

    array: the rows from `first` on of `rows`, at least those that its own devices take; all of them unless said.
    """
    shape = array.shape if rows is None else (rows, *array.shape[1:])

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return array[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, piece)


def as_lying[Tree](tree: Tree) -> Tree:
    """A model, a state or gradients, constrained to lie as RULES says."""
    mesh = current()
    if mesh is None:
        return tree
    constrained: Tree = jax.tree.map(
        lambda leaf, wanted: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, wanted)),
        tree,
        specs(tree, mesh),
    )
    return constrained


def gather[Tree](tree: Tree, prefix: str = "", *, stacked: bool = True) -> Tree:
    """Parameters as products want them: whole along `fsdp`.

    prefix: what stands before the names of `tree` in the model's.
    stacked: whether the leaves are one layer of stacked ones, whose leading axis the rules count.

    Gradients are summed and cut in one go (a reduce-scatter): the cotangent is constrained to how the parameter lies.
    """
    mesh = current()
    if mesh is None or not gathers():
        return tree

    def one(path: Any, leaf: Array) -> Array:
        lying = spec(f"{prefix}.{name_of(path)}".strip("."), mesh)
        lying = P(*lying[1:]) if stacked else lying
        if "fsdp" not in tuple(lying):
            return leaf
        used = P(*(None if axes == "fsdp" else axes for axes in lying))
        return _gather(leaf, NamedSharding(mesh, lying), NamedSharding(mesh, used))

    return jax.tree.map_with_path(one, tree)


def _gather(weight: Array, lying: NamedSharding, used: NamedSharding) -> Array:
    def forward(_: tuple[()], weight: Array) -> Array:
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, lying), used)

    def transposed(_: tuple[()], grad: Array) -> Array:
        return jax.lax.with_sharding_constraint(grad, lying)

    return jax.custom_derivatives.linear_call(forward, transposed, (), weight)


def gathers() -> bool:
    """Whether `gather` has anything to do."""
    mesh = current()
    return mesh is not None and size_of(mesh, "fsdp") > 1


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass gathers weights again, and makes nothing else again."""
    # A reshaped weight is one, too, and must not be kept; to reshape again costs nothing.
    return primitive.name not in ("linear_call", "sharding_constraint", "reshape")
