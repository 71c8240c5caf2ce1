"""A trace of a few steps in the middle of a run, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import os
from typing import Any

import jax

from nosa_jax._paths import user_path
from pallas_kernels.checks import bad_type, bad_value, require_int


def as_profile_steps(argument: str, value: Any) -> tuple[int, int] | None:
    """`value`, None or the numbers of the first and the last step of a trace, counted from 1, as a tuple.

    Raises TypeError or ValueError for anything else.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise bad_type(argument, "must be two numbers of steps, or None", f"{value!r:.60}", "Pass (10, 12).")
    first, last = (require_int(argument, step, 1) for step in value)
    if last < first:
        raise bad_value(argument, "must not end before it begins", (first, last), "Pass the smaller number first.")
    return first, last


class Profiler:
    """Traces the steps `first` to `last` of a run into a folder. A context manager, which ends a trace that is cut.

    directory: where the trace goes.
    steps: (first, last), counted from 1; None traces nothing. A run that is resumed between them traces the rest.

    The first step of a run compiles: trace later ones. Raises as `as_profile_steps` does.
    """

    def __init__(self, directory: str | os.PathLike[str], steps: tuple[int, int] | None) -> None:
        self.directory = user_path("directory", directory)
        self.steps = as_profile_steps("steps", steps)
        self.running = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def before(self, step: int, pending: Any = None) -> None:
        """Called before step number `step`. pending: what the steps before it return, waited for before a trace."""
        if self.steps is None or self.running or not self.steps[0] <= step <= self.steps[1]:
            return
        jax.block_until_ready(pending)  # otherwise work that was queued earlier would be in the trace
        jax.profiler.start_trace(self.directory)
        self.running = True

    def after(self, step: int, results: Any = None) -> None:
        """Called after step number `step`. results: what it returned, waited for before the trace ends."""
        if self.steps is not None and step >= self.steps[1]:
            self.stop(results)

    def stop(self, results: Any = None) -> None:
        """Ends the trace, if one is running."""
        if self.running:
            self.running = False
            try:
                jax.block_until_ready(results)
            finally:
                jax.profiler.stop_trace()
