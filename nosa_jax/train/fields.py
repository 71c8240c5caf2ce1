"""Configurations from plain dictionaries, as JSON and TOML files hold them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from nosa_jax.config import ModelConfig
from pallas_kernels.checks import bad_type, bad_value


def from_fields[Config](cls: type[Config], fields: Any, *, remedy: str | None = None) -> Config:
    """The inverse of `dataclasses.asdict` for a configuration, whose fields may be configurations too.

    cls: the dataclass. What is not given has its default.
    fields: a mapping by name of field; lists stand for tuples, as JSON has no other, and tables for tuples of pairs.
    remedy: what the error says to do about unknown fields; None lists those that there are.

    Raises ValueError for fields that there are none of, TypeError for what is no mapping, for one without a field that
    has no default, and, as values out of range, what `cls` itself raises.
    """
    name = cls.__name__
    if not isinstance(fields, Mapping):
        raise bad_type(name, "must be a table of fields", f"{type(fields).__name__} {fields!r:.60}", "Write one.")
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(fields) - set(known)))
    if unknown:
        rule = "must have fields of this version only"
        raise bad_value(name, rule, unknown, remedy or f"There are: {', '.join(known)}.")
    needed = [field.name for field in known.values() if _has_no_default(field) and field.name not in fields]
    if needed:
        raise bad_type(name, "must have all fields without a default", f"none for {needed}", "Add them.")
    hints = typing.get_type_hints(cls)
    values = {
        field: from_fields(hints[field], value, remedy=remedy)
        if dataclasses.is_dataclass(hints[field])
        else _as_tuple(value)
        for field, value in fields.items()
    }
    return cls(**values)


def model_config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` after a trip through JSON, which turns tuples into lists.

    Raises ValueError for fields that there are none of here, as those of a later version, and TypeError or LookupError
    for what is no configuration.
    """
    parts = {name: fields[name] for name in ("rope", "attention")}  # whole ones have both
    remedy = "A later version of nosa-jax wrote them: use that, or a later one."
    return from_fields(ModelConfig, {**fields, **parts}, remedy=remedy)


def differences(here: Any, there: Any, prefix: str = "") -> str:
    """How two configurations of a class differ, in words: `attention.variant='nosa' instead of 'full', ...`."""
    found = []
    for field in dataclasses.fields(here):
        name, one, other = f"{prefix}{field.name}", getattr(here, field.name), getattr(there, field.name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            found.append(differences(one, other, f"{name}."))
        elif one != other:
            found.append(f"{name}={one!r:.60} instead of {other!r:.60}")
    return ", ".join(filter(None, found))


def _has_no_default(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _as_tuple(value: Any) -> Any:
    """Lists, and mappings as their items, as tuples at any depth; anything else as it is."""
    value = list(value.items()) if isinstance(value, Mapping) else value
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value
