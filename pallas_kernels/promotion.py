"""Promotion as this code is written for, whatever the caller has switched on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def usual_promotion[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: runs, and is traced, as if `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` were unset.

    Who sets them to "raise" and "strict" means their own code; results are the same. Only for functions that are done
    when they return: what they hand out must not be traced later.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call
