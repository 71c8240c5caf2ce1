"""Values of a config.json, checked one by one: the error names the key and says what it should have been."""

from __future__ import annotations

import math
from typing import Any

from nosa_jax.origin import CONFIG_NAME
from pallas_kernels.checks import bad_value

# Sizes that no file can hold are refused before anything is computed with them.
_MAX_SIZE = 2**31 - 1
_REMEDY = "Restore the file or download it again."


def integer(raw: dict[str, Any], key: str, default: int | None = None, *, low: int = 1) -> int:
    """`raw[key]`, from `low` up to 2**31 - 1; `default` where it is absent or null. Raises ValueError."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise bad_value(CONFIG_NAME, f"must have the key {key!r}", f"keys {sorted(raw)}", _REMEDY)
        return default
    if type(value) is not int or not low <= value <= _MAX_SIZE:
        rule = f"must be a whole number from {low} to 2**31 - 1"
        raise bad_value(f"{CONFIG_NAME}: {key}", rule, f"{value!r:.30}", _REMEDY)
    return value


def boolean(raw: dict[str, Any], key: str) -> bool:
    """`raw[key]`, False where it is absent or null. Raises ValueError."""
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise bad_value(f"{CONFIG_NAME}: {key}", "must be true or false", f"{value!r:.60}", "Restore the file.")
    return bool(value)


def number(raw: dict[str, Any], key: str, *, low: float) -> float:
    """`raw[key]` as a finite float above `low`. Raises ValueError."""
    return as_number(key, raw.get(key), low=low)


def as_number(name: str, value: Any, *, low: float) -> float:
    if type(value) in (int, float) and low < value <= 1e30 and math.isfinite(value):
        return float(value)
    raise bad_value(f"{CONFIG_NAME}: {name}", f"must be a finite number above {low}", f"{value!r:.30}", _REMEDY)
