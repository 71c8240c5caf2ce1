"""Several processes that compute together: who writes, and what all must agree on. With one process nothing happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pallas_kernels.checks import bad_value, require_int, require_size


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to those that compute with it; before anything else is done with JAX.

    coordinator_address: host and port of the first process, e.g. "10.0.0.1:1234".
    num_processes: how many there are.
    process_id: which one this is, from 0.

    With none of them JAX finds all in the environment that Slurm, Kubernetes or Open MPI made. Afterwards
    `jax.devices()` are those of all processes. Raises ValueError where some are given without the others.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        rule = f"must be given with {' and '.join(name for name in given if name not in missing)}"
        raise bad_value(" and ".join(missing), rule, None, "Give all three, or none in a cluster that JAX knows.")
    if num_processes is not None and process_id is not None:
        require_size("process_id", process_id, 0, require_int("num_processes", num_processes, 1) - 1)
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def is_writer() -> bool:
    """Whether this process writes logs and shows progress."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def differs(number: int) -> bool:
    """Whether a number, below 2**32, is not the same in all processes; all of them must ask."""
    if jax.process_count() == 1:
        return False
    return len(np.unique(multihost_utils.process_allgather(np.array(number, np.uint32)))) > 1


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
    """An error inside, in any process, ends the block with an error in all of them; else some would wait for ever."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:  # Ctrl-C, too: the others wait for an answer
        error = raised
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{what} failed in another process, whose message says why")


@contextlib.contextmanager
def writing(what: str) -> Iterator[bool]:
    """Whether this process is to write; none goes on before that is done, and an error of the writer's ends all."""
    with failing_together(what):
        yield is_writer()


def whole[Tree](tree: Tree) -> Tree:
    """`tree` with whole NumPy arrays in every process, wherever their parts lie; all processes must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def to_host(tree: Any) -> Any:
    """Arrays that every process holds whole, such as metrics, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) else x, tree)
