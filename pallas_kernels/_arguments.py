"""What the ops take for arrays, layers and scales, and what they make of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import checks
from pallas_kernels.checks import bad_type, bad_value, is_concrete, require_floats, require_shape

# With None where there was None, which a type checker is told nothing of: every optional argument would need a cast.
if TYPE_CHECKING:
    Arrays = tuple[Array, ...]
else:
    Arrays = tuple[Any, ...]


def as_floats(**arrays: Any) -> Arrays:
    """Each as a JAX array, from NumPy or nested lists too; None stays. Raises TypeError for what holds no floats."""
    found: dict[str, Any] = {name: x if x is None else _as_array(name, x) for name, x in arrays.items()}
    require_floats(**found)
    return tuple(found.values())


def as_integers(**arrays: Any) -> Arrays:
    """`checks.as_integers` of each; None stays."""
    found: list[Any] = [x if x is None else checks.as_integers(name, x) for name, x in arrays.items()]
    return tuple(found)


def as_layer(layer: Any, layers: int | None) -> Int32[Array, ""]:
    """The index of one of so many layers, None for any number. Refused out of range, where its value can be seen."""
    index = checks.as_integers("layer", layer)
    require_shape("layer", index, (), "[]")
    if layers is not None and is_concrete(layer) and not 0 <= int(jax.device_get(layer)) < layers:
        raise bad_value("layer", f"must be in [0, L = {layers})", layer, "Count layers from 0.")
    return index


def as_scale(scale: Any, dim: int) -> float:
    """`scale` as a float of Python, 1 / sqrt(dim) for None."""
    if scale is None:
        return dim**-0.5
    return float(checks.require_number("scale", scale, -math.inf))


def in_host_memory(argument: str, host: Any) -> Array:
    """`host` where it is; what is no JAX array yet is put into `pinned_host` memory."""
    if not isinstance(host, jax.Array):
        host = jax.device_put(jnp.asarray(host), jax.memory.Space.Host)
    return as_floats(**{argument: host})[0]


def require_count(count: Array, new: int) -> None:
    """Raises ValueError unless each row counts between 0 and `new` tokens, where values can be seen."""
    if is_concrete(count) and count.size:
        values = jax.device_get(count)
        if values.min() < 0 or values.max() > new:
            raise bad_value("count", f"must be in [0, n = {new}]", values.tolist(), "Count new tokens only.")


def require_dtype(argument: str, array: Any, dtype: Any, why: str) -> None:
    """Raises TypeError unless `array` has that dtype."""
    if array.dtype != dtype:
        raise bad_type(argument, f"must be {dtype}, {why}", array.dtype, f"Cast it: {argument}.astype(jnp.{dtype}).")


def _as_array(argument: str, value: Any) -> Array:
    if isinstance(value, jax.Array):
        return value
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        got = f"{type(value).__name__} {value!r:.60}"
        raise bad_type(argument, "must be an array of floats", got, "Pass jnp.asarray of numbers.") from error
    if not hasattr(value, "dtype") and array.size == 0:
        return array.astype(jnp.float32)
    return array
