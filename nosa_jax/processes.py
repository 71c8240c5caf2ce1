"""Several processes that compute together: who writes, and what all must agree on. With one process nothing happens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.checks import bad_value, require_int, require_size


class OtherProcessError(RuntimeError):
    """What ends a process because another one has failed, whose own error says why."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} failed in another process, whose message says why")


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to those that compute with it; before anything else is done with JAX.

    coordinator_address: host and port of the first process, e.g. "10.0.0.1:1234".
    num_processes: how many there are.
    process_id: which one this is, from 0.

    With none of them JAX finds all in the environment that Slurm, Kubernetes or Open MPI made. Afterwards
    `jax.devices()` are those of all processes. SIGTERM keeps its meaning: it ends a process, and one that is in
    `train` saves first. Raises ValueError where some are given without the others, where none are and there is no
    cluster, and where JAX was used before.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        rule = f"must be given with {' and '.join(name for name in given if name not in missing)}"
        raise bad_value(" and ".join(missing), rule, None, "Give all three, or none in a cluster that JAX knows.")
    if coordinator_address is not None and not re.fullmatch(r".+:\d+", coordinator_address):
        raise bad_value("coordinator_address", "must be a host and a port", coordinator_address, "Write 10.0.0.1:1234.")
    if num_processes is not None and process_id is not None:
        require_size("process_id", process_id, 0, require_int("num_processes", num_processes, 1) - 1)
    # JAX's service would take SIGTERM for a notice that somebody asks it for, and so swallow it where nobody does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except jax.errors.JaxRuntimeError:  # the others do not answer, say
        raise
    except RuntimeError as error:
        rule = "must be called before anything else is done with JAX, and once"
        raise bad_value("initialize", rule, "a process that uses JAX", "Call it first, or begin afresh.") from error
    except ValueError as error:
        if not missing:
            raise
        rule = "must be given where JAX finds no cluster"
        remedy = "Give num_processes and process_id, too, or start all processes by Slurm, Kubernetes or Open MPI."
        raise bad_value("coordinator_address", rule, None, remedy) from error


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
    """An error inside, in any process, ends the block with an error in all of them; else some would wait for ever.

    It is its own error in the process where it arose, and OtherProcessError in the others.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:  # Ctrl-C, too: the others wait for an answer
        error = raised
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise OtherProcessError(what)


@contextlib.contextmanager
def writing(what: str) -> Iterator[bool]:
    """Whether this process is to write; none goes on before that is done, and an error of the writer's ends all."""
    with failing_together(what):
        yield is_writer()


class Peers:
    """What the processes of a run tell each other as they go: that one is to stop, and that one has failed.

    All of them make the same calls in the same order. What one does alone, such as writing a log, is done inside
    `holding`: an error there waits until all have heard of it, for the others could not go on without this process.
    With one process errors are raised where they arise, and nothing is computed.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._asked: Any = None

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keeps an error inside, the first one, for the next `answer` or `settle`."""
        try:
            yield
        except BaseException as error:  # Ctrl-C, too
            if jax.process_count() == 1:
                raise
            self._error = self._error or error

    def ask(self, stop: bool) -> None:
        """Asks all whether one is to stop or has failed. Queued behind what the devices have to do; see `answer`."""
        flags = np.array([[stop, self._error is not None]])
        self._asked = flags if jax.process_count() == 1 else _any_of_all(flags)

    def answer(self) -> bool:
        """Whether one was to stop when all were asked; all get the same answer.

        Waits for what was queued before the question, not for what came after it. Raises the error held here, or
        OtherProcessError where another process has failed.
        """
        stop, failed = (bool(flag) for flag in to_host(self._asked)[0])
        if failed and self._error is not None:
            raise self._error
        if failed:
            raise OtherProcessError("training")
        return stop

    def settle(self, stop: bool) -> bool:
        """`ask` and `answer` at once, where nothing is left to be computed meanwhile."""
        self.ask(stop)
        return self.answer()


def _any_of_all(flags: np.ndarray) -> Any:
    """Which flags [1, n] are set in any process, [1, n] on every device; not waited for."""
    devices = Mesh(np.array(jax.devices()), ("devices",))
    parts = jax.make_array_from_callback(
        (devices.size, flags.shape[1]), NamedSharding(devices, PartitionSpec("devices")), lambda _: flags
    )
    return _any(parts, NamedSharding(devices, PartitionSpec()))


@partial(jax.jit, static_argnames="place")
def _any(flags: Any, place: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(flags.any(0, keepdims=True), place)


def whole[Tree](tree: Tree) -> Tree:
    """`tree` with whole NumPy arrays in every process, wherever their parts lie; all processes must ask.

    Of an array that lies on devices of this process alone it is this process's own.
    """

    def of_leaf(leaf: Any) -> Any:
        # JAX would take arrays of one process for parts of a larger one, and put all of them in a row.
        shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return multihost_utils.process_allgather(leaf, tiled=True) if shared else jax.device_get(leaf)

    return jax.tree.map(of_leaf, tree)


def to_host(tree: Any) -> Any:
    """Arrays that every process holds whole, such as metrics, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) else x, tree)
