"""Programs on a mesh: axes of any kind made automatic, activations cut, rows that have nothing to tell each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from nosa_jax.parallel.mesh import ROWS, current, fitting, size_of


def run[R](mesh: AbstractMesh | None, body: Callable[..., R], *args: Any, out: Any = None) -> R:
    """`body(*args)` where `current()` is `mesh`, with all its axes automatic.

    out: like what comes out, with a PartitionSpec for each array or for a pytree of them, of which what does not fit
        is left away: on Explicit axes it is part of the results' types.
    """
    if mesh is None:
        return body(*args)
    if AxisType.Explicit not in mesh.axis_types:
        with jax.sharding.use_abstract_mesh(mesh):
            return body(*args)
    explicit = tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))):
        results = jax.eval_shape(body, *jax.tree.map(_untyped, args))

    def place(wanted: P, x: Any) -> NamedSharding:
        names = {name for axes in wanted for name in (axes if isinstance(axes, tuple) else (axes,))}
        divides = all(size % size_of(mesh, axes) == 0 for size, axes in zip(x.shape, wanted, strict=False))
        fits = divides and names <= {None, *mesh.axis_names}
        return NamedSharding(mesh, wanted if fits else fitting(mesh, x.shape, wanted))

    of_part = lambda wanted, part: jax.tree.map(partial(place, wanted), part)
    placed = jax.tree.map(of_part, out, results, is_leaf=_is_spec)
    with jax.sharding.use_abstract_mesh(mesh):
        result: R = jax.sharding.auto_axes(body, axes=explicit, out_sharding=placed)(*args)
        return result


def _untyped(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x


def rows_of(tokens: Array) -> Any:
    """The axes that cut rows of tokens: by their type, if they have one on a mesh of Explicit axes, else ROWS."""
    sharding = jax.typeof(tokens).sharding
    explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
    return sharding.spec[0] if explicit else ROWS


def constrain(x: Array, *axes: Any) -> Array:
    """`x`, cut along mesh axes: one entry per dimension, a name, several or None. Axes that do not divide are left."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(mesh, x.shape, P(*axes))))


def activations(x: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
    """Hidden states, cut along rows and queries."""
    return constrain(x, ROWS, "context")


def by_rows[R](
    mesh: AbstractMesh | None, body: Callable[..., R], args: tuple[Any, ...], specs: tuple[Any, ...], out: Any
) -> R:
    """`body(*args)` where every device does its own rows with the whole model, and none talks to another.

    specs, out: of arguments and results (a pytree may stand for one that begins with it), with ROWS in the place of
        rows. Where these cannot be shared out evenly, every device does all.
    """
    if mesh is None:
        return body(*args)

    rows = fitting(mesh, (math.gcd(*_rows(args, specs)),), P(ROWS))[0]
    cut = lambda tree: jax.tree.map(
        lambda spec: P(*(rows if axes == ROWS else axes for axes in spec)), tree, is_leaf=_is_spec
    )
    with jax.sharding.use_abstract_mesh(mesh):
        if AxisType.Explicit in mesh.axis_types:
            args = jax.tree.map(_resharded, cut(specs), args, is_leaf=_is_spec)
        # Loops begin with what is the same everywhere and go on with what is not: nothing here needs to be told.
        return jax.shard_map(body, mesh=mesh, in_specs=cut(specs), out_specs=cut(out), check_vma=False)(*args)


def _resharded(wanted: P, tree: Any) -> Any:
    """Arrays of Explicit axes, lying as wanted. What lies so is left alone: JAX would forget that it is on the host."""

    def reshard(x: Array) -> Array:
        full = P(*wanted, *(None,) * (x.ndim - len(wanted)))
        return x if jax.typeof(x).sharding.spec == full else jax.sharding.reshard(x, full)

    return jax.tree.map(reshard, tree)


def _rows(trees: Any, specs: Any) -> list[int]:
    """How many rows each array has."""
    count = lambda spec, part: [x.shape[tuple(spec).index(ROWS)] for x in jax.tree.leaves(part) if ROWS in tuple(spec)]
    counts: list[int] = jax.tree.leaves(jax.tree.map(count, specs, trees, is_leaf=_is_spec))
    return counts


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
