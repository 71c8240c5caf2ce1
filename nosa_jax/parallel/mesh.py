"""The axes of a mesh, making one, and finding the one that is computed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.checks import bad_value, require_int

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")  # what cuts the rows of a batch


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
        remedy = "Change a size, or give one as -1 for the rest. JAX_NUM_CPU_DEVICES=4 makes a CPU count as four."
        raise bad_value("mesh", rule, written, remedy)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(kind,) * len(AXES), devices=devices)


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


def mesh_of(*trees: Any) -> AbstractMesh | None:
    """The mesh that arrays lie on, or that of JAX's context; None where there is none of several devices.

    None, too, inside `jax.shard_map`: there every device computes what it is given.
    """
    of_context = jax.sharding.get_abstract_mesh()
    if not of_context.empty and AxisType.Manual in of_context.axis_types:
        return None
    arrays = (leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array))
    meshes = [of_context, *(jax.typeof(array).sharding.mesh for array in arrays)]
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


def current() -> AbstractMesh | None:
    """The mesh of automatic axes that is computed on; None on a single device and inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def fitting(mesh: Mesh | AbstractMesh, shape: Sequence[int], wanted: P) -> P:
    """A PartitionSpec of the axes that the mesh has and that divide a shape; of several, as many as do together."""

    def fit(size: int, axes: Any) -> Any:
        kept: tuple[str, ...] = ()
        for name in axes if isinstance(axes, tuple) else (axes,):
            if mesh.shape.get(name, 1) > 1 and size % size_of(mesh, (*kept, name)) == 0:
                kept += (name,)
        return kept[0] if len(kept) == 1 else kept or None

    return P(*(fit(size, axes) for size, axes in zip(shape, wanted, strict=False)))
