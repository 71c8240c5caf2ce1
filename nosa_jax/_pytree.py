"""Frozen dataclasses that are JAX pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, dataclass_transform

import jax


@dataclass_transform(frozen_default=True)
def pytree_dataclass[T](cls: type[T]) -> type[T]:
    """Every field is a child, None where there is nothing; fields made by `static_field` are part of the structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static_field() -> Any:
    return dataclasses.field(metadata={"static": True})
