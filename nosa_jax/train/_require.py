"""Checks shared by the files of this package."""

from __future__ import annotations

import importlib
import math
from typing import Any

from pallas_kernels.checks import bad_type, bad_value


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raises TypeError unless `value` is an int, ValueError when it is below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(name, "must be an int", repr(value), f"Pass a whole number >= {minimum}.")
    if value < minimum:
        raise bad_value(name, f"must be >= {minimum}", value, f"Raise it to at least {minimum}.")


def require_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless `low <= value <= high` (finite)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_type(name, "must be a number", repr(value), "Pass an int or a float.")
    if not (low <= value <= high and math.isfinite(value)):
        rule = f"must be >= {low}" if high == math.inf else f"must lie between {low} and {high}"
        raise bad_value(name, f"{rule} and finite", value, "Change it.")


def import_extra(module: str) -> Any:
    """Imports a package of the `train` extra. Raises ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'Training needs {module}. Install it: pip install "nosa-jax[train]"') from error
