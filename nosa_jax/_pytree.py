"""Frozen dataclasses that are JAX pytrees, and the names of what is in a pytree."""

from __future__ import annotations

import dataclasses
from typing import Any, dataclass_transform

import jax


@dataclass_transform(frozen_default=True)
def pytree_dataclass[T](cls: type[T]) -> type[T]:
    """Every field is a child, None where there is nothing; fields made by `static_field` are part of the structure.

    Its repr is short, see `short_repr`.
    """
    frozen = dataclasses.dataclass(frozen=True, repr=False)(cls)
    frozen.__repr__ = short_repr  # type: ignore[method-assign, assignment]
    return jax.tree_util.register_dataclass(frozen)


def static_field() -> Any:
    return dataclasses.field(metadata={"static": True})


def short_repr(value: Any) -> str:
    """The repr of a dataclass or named tuple of arrays, each by dtype, shape and, off the device, memory kind alone.

    No array is looked into, so that nothing crosses from a device.
    """
    names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]
    return f"{type(value).__name__}({', '.join(f'{name}={_short(getattr(value, name))}' for name in names)})"


def _short(value: Any) -> str:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return repr(value)
    text = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    is_array = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    kind = value.sharding.memory_kind if is_array else None
    return f"{text} in {kind}" if kind is not None and kind.endswith("host") else text


def name_of(path: tuple[Any, ...]) -> str:
    """The dotted name of a key path of `jax.tree`, e.g. `layers.attention.importance.A`."""
    # `.value` is where NNX keeps a parameter's array: no part of its name.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, in the order of `jax.tree.leaves`."""
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
