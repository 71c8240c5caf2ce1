"""Frozen dataclasses that are JAX pytrees: every field a child, None where there is nothing."""

from __future__ import annotations

import dataclasses
from typing import dataclass_transform

import jax


@dataclass_transform(frozen_default=True)
def pytree_dataclass[T](cls: type[T]) -> type[T]:
    frozen = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(frozen)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(frozen, data_fields=names, meta_fields=[])
