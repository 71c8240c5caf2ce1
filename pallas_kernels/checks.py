"""One shape for every message about bad input: argument, rule, value, remedy."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# What `as_integers` takes: an array of JAX, NumPy or another library, or nested lists.
IntegersLike = ArrayLike | Sequence[Any]


def bad_value(argument: str, rule: str, got: Any, remedy: str) -> ValueError:
    """The error to raise when `argument` breaks `rule`; `remedy` is a full sentence."""
    return ValueError(f"{argument}: {rule}, got {got}. {remedy}")


def bad_type(argument: str, rule: str, got: Any, remedy: str) -> TypeError:
    return TypeError(f"{argument}: {rule}, got {got}. {remedy}")


def require_type(argument: str, value: Any, expected: type, remedy: str) -> None:
    """Raises TypeError unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        name = expected.__name__
        article = "an" if name[0] in "AEIOUaeiou" else "a"
        raise bad_type(argument, f"must be {article} {name}", f"{type(value).__name__} {value!r:.60}", remedy)


def require_given(**arrays: Any) -> None:
    """Raises TypeError for an argument that is None."""
    for argument, array in arrays.items():
        if array is None:
            raise bad_type(argument, "must be given", None, "Pass an array.")


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
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise bad_type(argument, "must be an array of integers", type(array).__name__, "Pass np.asarray of it.")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise bad_type(argument, "must hold integers", dtype, f"Cast it: {argument}.astype(jnp.int32).")


def as_integers(argument: str, value: Any, *, look: bool = True) -> jax.Array:
    """`value` as an int32 array. Raises TypeError or ValueError unless it is an array or nested lists of integers.

    What holds nothing at all, as `[[], []]`, counts as integers.
    look: False leaves values alone that lie on a device, for which it would have to be waited for.
    """
    if not isinstance(value, jax.Array | np.ndarray):
        if isinstance(value, list | tuple) and not is_concrete(*jax.tree.leaves(value)):
            value = jnp.asarray(value)
        else:
            value = _as_numpy(argument, value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "USO":
        got = "text" if value.dtype.kind in "US" else _odd_one(value)
        raise bad_type(argument, "must hold integers", got, "Pass ids, which a tokenizer gives for text.")
    require_integers(argument, value)
    limits = np.iinfo(np.int32)  # before the cast would wrap values into range
    look = look or isinstance(value, np.ndarray)
    if look and value.size and is_concrete(value) and not np.can_cast(value.dtype, np.int32):
        least, most = int(value.min()), int(value.max())
        if least < limits.min or most > limits.max:
            raise bad_value(argument, "values must fit in int32", f"{least} to {most}", "Check the values.")
    return jnp.asarray(value.astype(np.int32) if isinstance(value, np.ndarray) else value, jnp.int32)


def _as_numpy(argument: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        remedy = "Right-pad the rows and pass lengths."
        raise bad_value(argument, "must be one rectangular array", f"({error})", remedy) from error
    return array.astype(np.int32) if array.size == 0 and isinstance(value, list | tuple) else array


def _odd_one(array: np.ndarray) -> str:
    """The first entry of an array of objects that is no integer."""
    odd = next((x for x in array.flat if isinstance(x, bool) or not isinstance(x, int)), array.flat[0])
    return f"{type(odd).__name__} {odd!r:.60}"


def as_float_dtype(argument: str, dtype: Any) -> np.dtype:
    """The dtype that `dtype` names. Raises TypeError unless it is one of floats."""
    try:
        found = None if dtype is None or isinstance(dtype, np.generic | np.ndarray | jax.Array) else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        got = f"{dtype!r:.60}" if found is None else found
        raise bad_type(argument, "must be a dtype of floats", got, "Pass jnp.bfloat16 or jnp.float32.")
    return found


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


def require_int(argument: str, value: Any, minimum: int, rule: str | None = None) -> int:
    """`value` as an int of Python; integers of NumPy and JAX are taken, bools are not.

    rule: what to say instead of what is broken. Raises TypeError unless it is an integer, ValueError below `minimum`.
    """
    number = _python_number(value)
    if not isinstance(number, int):
        raise bad_type(argument, rule or "must be an int", f"{value!r:.60}", f"Pass a whole number >= {minimum}.")
    if number < minimum:
        raise bad_value(argument, rule or f"must be >= {minimum}", number, f"Raise it to at least {minimum}.")
    return number


def require_size(argument: str, value: Any, minimum: int, maximum: int = 2**31 - 1) -> int:
    """`require_int` for what kernels count with: int32, and what is unrolled or padded to stays small.

    Raises ValueError above `maximum`, too.
    """
    number = require_int(argument, value, minimum)
    if number > maximum:
        raise bad_value(argument, f"must be <= {maximum}", number, f"Lower it to at most {maximum}.")
    return number


def require_number(argument: str, value: Any, low: float, high: float = math.inf) -> int | float:
    """`value` as a number of Python; numbers of NumPy and JAX are taken, bools are not.

    Raises TypeError unless it is a number, ValueError unless `low <= value <= high` (finite).
    """
    number = _python_number(value)
    if number is None:
        raise bad_type(argument, "must be a number", f"{value!r:.60}", "Pass an int or a float.")
    if not (low <= number <= high and abs(number) <= sys.float_info.max):
        rule = f"must lie between {low} and {high}" if high < math.inf else f"must be >= {low}"
        rule = "must be finite" if low == -math.inf and high == math.inf else f"{rule} and finite"
        raise bad_value(argument, rule, number, "Change it.")
    return number


def require_bool(argument: str, value: Any) -> bool:
    """`value` as a bool of Python, also from NumPy's. Raises TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise bad_type(argument, "must be True or False", f"{value!r:.60}", "Pass a bool; under jit, a static one.")
    return bool(value)


def require_one_of(argument: str, value: Any, choices: Sequence[str], remedy: str = "Pick one.") -> None:
    """Raises ValueError unless `value` is one of the texts."""
    if not (isinstance(value, str) and value in choices):
        *others, last = map(repr, choices)
        rule = f"must be {', '.join(others)} or {last}" if len(choices) < 4 else f"must be one of {tuple(choices)}"
        raise bad_value(argument, rule, f"{value!r:.60}", remedy)


def _python_number(value: Any) -> int | float | None:
    """The int or float that `value` is, which may be NumPy's or an array without axes; None for anything else."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and is_concrete(value) and value.ndim == 0:
        kind = next((kind for kind in (int, float) if jnp.issubdtype(value.dtype, _KINDS[kind])), None)
        value = None if kind is None else kind(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


_KINDS = {int: jnp.integer, float: jnp.floating}


def is_concrete(*arrays: Any) -> bool:
    """True when every array has values to look at, that is, outside `jax.jit`."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def is_tracing() -> bool:
    """True inside `jax.jit`, also where no argument is traced."""
    return isinstance(jax.lax.iota("int32", 1), jax.core.Tracer)  # made where it is: nothing crosses to a device
