"""Several processes that train together: who writes, and what all must agree on. With one process nothing happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_writer() -> bool:
    """Whether this process writes logs and shows progress."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
    """An error inside, in any process, ends the block with an error in all of them; else some would wait for ever."""
    error: BaseException | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{what} failed in another process, whose message says why")


def to_host(tree: Any) -> Any:
    """Arrays that every process holds whole, such as metrics, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) else x, tree)
