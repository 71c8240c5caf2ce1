"""One shape for every message about bad input: argument, rule, value, remedy."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np


def bad_value(argument: str, rule: str, got: Any, remedy: str) -> ValueError:
    """The error to raise when `argument` breaks `rule`; `remedy` is a full sentence."""
    return ValueError(f"{argument}: {rule}, got {got}. {remedy}")


def bad_type(argument: str, rule: str, got: Any, remedy: str) -> TypeError:
    return TypeError(f"{argument}: {rule}, got {got}. {remedy}")


def require_type(argument: str, value: Any, expected: type, remedy: str) -> None:
    """Raises TypeError unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        raise bad_type(argument, f"must be a {expected.__name__}", f"{type(value).__name__} {value!r:.60}", remedy)


def require_shape(argument: str, array: Any, expected: tuple[int | None, ...], letters: str) -> None:
    """Raises ValueError unless `array.shape` equals `expected` (None: any size)."""
    shape = tuple(array.shape)
    matches = len(shape) == len(expected) and all(e is None or e == s for s, e in zip(shape, expected, strict=True))
    if not matches:
        names = letters.strip("[]").split(", ")
        sizes = ", ".join(name if e is None else str(e) for name, e in zip(names, expected, strict=False))
        wanted = letters if set(expected) == {None} else f"{letters} = [{sizes}]"
        raise bad_value(argument, f"must have shape {wanted}", list(shape), "Reshape or transpose it.")


def require_integers(argument: str, array: Any) -> None:
    """Raises TypeError unless `array` has an integer dtype."""
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.integer):
        raise bad_type(argument, "must hold integers", array.dtype, f"Cast it: {argument}.astype(jnp.int32).")


def require_floats(**arrays: Any) -> None:
    """Raises TypeError for an array that has no float dtype; None passes."""
    for argument, array in arrays.items():
        if array is not None and not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise bad_type(argument, "must hold floats", array.dtype, f"Cast it: {argument}.astype(jnp.float32).")


def require_ascending(argument: str, positions: Any) -> None:
    """Raises ValueError where positions [B, T] do not ascend strictly, apart from -1; only where values can be seen."""
    if not is_concrete(positions):
        return
    for row, values in enumerate(np.asarray(jax.device_get(positions))):
        real = values[values >= 0]
        wrong = np.flatnonzero(np.diff(real) <= 0)
        if wrong.size:
            raise bad_value(
                argument,
                "must ascend strictly along each row, -1 apart (they do not restart with a document)",
                f"{real[wrong[0]]} before {real[wrong[0] + 1]} in row {row}",
                "Sort the queries, and count along the whole row.",
            )


def require_int(argument: str, value: Any, minimum: int) -> None:
    """Raises TypeError unless `value` is an int and no bool, ValueError when it is below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(argument, "must be an int", repr(value), f"Pass a whole number >= {minimum}.")
    if value < minimum:
        raise bad_value(argument, f"must be >= {minimum}", value, f"Raise it to at least {minimum}.")


def require_number(argument: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises TypeError unless `value` is a number and no bool, ValueError unless `low <= value <= high` (finite)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_type(argument, "must be a number", repr(value), "Pass an int or a float.")
    if not (low <= value <= high and math.isfinite(value)):
        rule = f"must be >= {low}" if high == math.inf else f"must lie between {low} and {high}"
        raise bad_value(argument, f"{rule} and finite", value, "Change it.")


def require_positive(argument: str, value: int) -> None:
    """Raises ValueError unless `value` is at least 1."""
    if value < 1:
        raise bad_value(argument, "must be >= 1", value, "Pass a count of tokens.")


def is_concrete(*arrays: Any) -> bool:
    """True when every array has values to look at, that is, outside `jax.jit`."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)
