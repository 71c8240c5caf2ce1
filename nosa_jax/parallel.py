"""Many devices: the axes of a mesh, the one table that says what is cut along which, and how the model uses both.

    mesh = parallel.make_mesh(fsdp=-1)  # all devices along one axis; make_mesh(data=2, fsdp=4) is for eight
    model = parallel.shard(model, mesh)
    out = nosa_jax.forward(model, tokens, logits="none")  # finds the mesh in its arguments

JAX's partitioner is the engine: products are cut as their operands are. Attention and selection run inside
`jax.shard_map`, every device its own rows, KV heads and queries. Axes of a mesh:

- `data`: rows of the batch; each device holds the whole model.
- `fsdp`: rows too, with the model and the optimizer cut along it. A layer's weights are gathered when it runs.
- `tensor`: KV heads with their query heads, the MLP's inner axis, and the vocabulary of the head.
- `context`: the queries of a row. Keys, values and importance are gathered, which are small with few KV heads. Each
  device has a piece from the beginning of a row and one from its end, so that all have the same causal work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from nosa_jax._pytree import name_of
from nosa_jax.processes import initialize as initialize
from pallas_kernels.checks import bad_value, require_int

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")  # what cuts the rows of a batch
_PIECES = 2  # of a row that a device of `context` holds

# The last names of a parameter, and the mesh axis of each of its dimensions; what is not named here is copied whole.
RULES: tuple[tuple[str, P], ...] = (
    ("embed", P(None, "fsdp")),
    ("lm_head", P("fsdp", "tensor")),
    ("attention.qkv", P(None, "fsdp", "tensor")),
    ("attention.qkv_bias", P(None, "tensor")),
    ("attention.output", P(None, "tensor", "fsdp")),
    ("importance.delta", P(None, "tensor")),
    ("mlp.gate_up", P(None, "fsdp", None, "tensor")),
    ("mlp.down", P(None, "tensor", "fsdp")),
)

_RANKS = {
    "embed": 2,
    "lm_head": 2,
    "attention.qkv": 5,
    "attention.qkv_bias": 4,
    "attention.output": 3,
    "importance.delta": 4,
    "mlp.gate_up": 4,
    "mlp.down": 3,
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh with all four axes.

    data, fsdp, tensor, context: devices along each axis; one of them may be -1, for what is left.
    devices: to use; None for `jax.devices()`, those of all processes.
    explicit: whether its axes are Explicit in JAX's sense, that is, part of the types of arrays; else Auto.

    Raises ValueError when the sizes do not make up the devices.
    """
    given = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    sizes = {name: require_int(name, size, -1) for name, size in given.items()}
    devices = jax.devices() if devices is None else list(devices)
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    written = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if 0 in sizes.values() or len(open_axes) > 1:
        raise bad_value("mesh", "sizes must be positive, at most one of them -1", written, "Change them.")
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        rule = f"sizes must multiply to the number of devices, {len(devices)}"
        remedy = "Change a size, give one as -1, or pass devices=. JAX_NUM_CPU_DEVICES=4 makes a CPU count as four."
        raise bad_value("mesh", rule, written, remedy)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(kind,) * len(AXES), devices=devices)


def spec(name: str, mesh: Mesh | AbstractMesh) -> P:
    """How the parameter of a dotted name, or its moments in an optimizer's state, lie on a mesh.

    As JAX writes it: without axes of one device and without None at the end, so that what comes out of a program is of
    the type of what went in.
    """
    rule = next((found for last, found in RULES if name == last or name.endswith(f".{last}")), P())
    axes = [name if mesh.shape.get(name, 1) > 1 else None for name in rule]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def specs(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`spec` for every leaf of a pytree, by its name; P() for one of another rank than the parameter of that name, as
    the factors of moments that some optimizers keep."""

    def of_leaf(path: Any, leaf: Any) -> P:
        name = name_of(path)
        return spec(name, mesh) if np.ndim(leaf) == _rank(name) else P()

    return jax.tree.map_with_path(of_leaf, tree)


def _rank(name: str) -> int | None:
    """The rank of the parameters that RULES knows by the end of a name; None for others, which lie whole anyway."""
    return next((rank for last, rank in _RANKS.items() if name == last or name.endswith(f".{last}")), None)


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


def from_host(array: np.ndarray, sharding: NamedSharding) -> Array:
    """An array that every process holds whole, on the devices of a mesh, each with its part of it."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def size_of(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Devices along one axis, or along several together; 1 for None and for axes that the mesh does not have."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape.get(name, 1) for name in names)


def require_axes(mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError for a mesh with axes that no rule knows."""
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        remedy = "Make it with parallel.make_mesh(data=..., fsdp=..., tensor=..., context=...)."
        raise bad_value("mesh", f"axes must be among {AXES}", unknown, remedy)


# Finding the mesh, and computing on it. -------------------------------------------------------------------------------


def mesh_of(*trees: Any) -> AbstractMesh | None:
    """The mesh that arrays lie on, or that of JAX's context; None where there is none of several devices.

    None, too, inside `jax.shard_map`: there every device computes what it is given.
    """
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and AxisType.Manual in current.axis_types:
        return None
    meshes = [current]
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array):
            sharding = jax.typeof(leaf).sharding
            meshes.append(sharding.mesh)
    found = next((mesh for mesh in meshes if not mesh.empty and mesh.size > 1), None)
    if found is None:
        return None
    if AxisType.Explicit not in found.axis_types and not set(found.axis_names) <= set(AXES):
        return None  # the partitioner does what it can with axes of other names
    require_axes(found)
    return found


def concrete_mesh(tree: Any) -> Mesh | None:
    """The mesh with its devices that arrays lie on, None where they lie on none."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


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


def current() -> AbstractMesh | None:
    """The mesh of automatic axes that is computed on; None on a single device and inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def constrain(x: Array, *axes: Any) -> Array:
    """`x`, cut along mesh axes: one entry per dimension, a name, several or None. Axes that do not divide are left."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(mesh, x.shape, P(*axes))))


def fitting(mesh: Mesh | AbstractMesh, shape: Sequence[int], wanted: P) -> P:
    """A PartitionSpec of the axes that the mesh has and that divide a shape; of several, as many as do together."""

    def fit(size: int, axes: Any) -> Any:
        kept: tuple[str, ...] = ()
        for name in axes if isinstance(axes, tuple) else (axes,):
            if mesh.shape.get(name, 1) > 1 and size % size_of(mesh, (*kept, name)) == 0:
                kept += (name,)
        return kept[0] if len(kept) == 1 else kept or None

    return P(*(fit(size, axes) for size, axes in zip(shape, wanted, strict=False)))


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


# Weights. -------------------------------------------------------------------------------------------------------------


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


# Rows, heads and queries. ---------------------------------------------------------------------------------------------


def context_size(length: int) -> int:
    """Among how many devices the queries of rows of `length` tokens are shared; 1 where the mesh does not divide it."""
    mesh = current()
    size = 1 if mesh is None else size_of(mesh, "context")
    return size if length % (_PIECES * size) == 0 else 1


def query_order(length: int) -> Int[np.ndarray, " T"] | None:
    """Which token of a row stands where, so that a cut among the devices of `context` gives each the same work.

    Device c of n gets piece c and piece 2n - 1 - c of 2n, ascending. None where rows are not cut.
    """
    size = context_size(length)
    if size == 1:
        return None
    pieces = np.arange(length).reshape(_PIECES * size, -1)
    return pieces[_piece_order(size)].reshape(-1)


def in_query_order(x: Array, axis: int) -> Array:
    """`x`, whose `axis` counts the tokens of rows, as `query_order` has them."""
    order = query_order(x.shape[axis])
    return x if order is None else jax.numpy.take(x, order, axis=axis)


def in_row_order(x: Array, axis: int) -> Array:
    """The inverse of `in_query_order`."""
    order = query_order(x.shape[axis])
    return x if order is None else jax.numpy.take(x, np.argsort(order), axis=axis)


def _piece_order(size: int) -> np.ndarray:
    return np.array([piece for c in range(size) for piece in (c, _PIECES * size - 1 - c)])


def all_tokens(x: Any) -> Any:
    """Inside `per_row_and_head`: [B, K, t, ...] of this device to that of all tokens of the rows, in their order."""
    if x is None or "context" not in jax.typeof(x).manual_axis_type.varying:
        return x
    size = jax.lax.axis_size("context")
    x = jax.lax.all_gather(x, "context", axis=2, tiled=True)
    pieces = x.reshape(*x.shape[:2], _PIECES * size, -1, *x.shape[3:])
    return pieces[:, :, np.argsort(_piece_order(size))].reshape(x.shape)


def per_row_and_head[R](body: Callable[..., R], args: tuple[Any, ...], axes: tuple[Any, ...], out: Any) -> R:
    """`body(*args)` with every device doing its own rows, KV heads, queries and part of the vocabulary.

    None among the arguments stays.

    axes: per argument, and `out` per result, the letter of each dimension: "b" rows, "k" KV heads or query heads by KV
        head, "t" queries, "v" the vocabulary, "." for what is whole.
    """
    mesh = current()
    if mesh is None:
        return body(*args)
    shapes: dict[str, int] = {}
    for x, letters in zip(args, axes, strict=True):
        if x is not None:
            for letter, size in zip(letters, x.shape, strict=True):
                shapes[letter] = math.gcd(shapes.get(letter, size), size)
    cut = {
        "b": fitting(mesh, (shapes.get("b", 1),), P(ROWS))[0],
        "k": fitting(mesh, (shapes.get("k", 1),), P("tensor"))[0],
        "t": "context" if context_size(shapes.get("t", 1)) > 1 else None,
        "v": fitting(mesh, (shapes.get("v", 1),), P("tensor"))[0],
        ".": None,
    }
    to_spec = lambda letters: P(*(cut[letter] for letter in letters))
    given = [(x, to_spec(letters)) for x, letters in zip(args, axes, strict=True) if x is not None]

    def fill(*present: Any) -> R:
        rest = iter(present)
        return body(*(None if x is None else next(rest) for x in args))

    in_specs = tuple(wanted for _, wanted in given)
    run = jax.shard_map(fill, mesh=mesh, in_specs=in_specs, out_specs=jax.tree.map(to_spec, out))
    return run(*(x for x, _ in given))
