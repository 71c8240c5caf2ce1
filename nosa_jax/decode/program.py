"""How the programs that read prompts and decode are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.checks import is_tracing
from pallas_kernels.promotion import usual_promotion

# Without it XLA copies every layer's weights at every step on a GPU, since its own matrix products cannot read a slice
# of the stack where it lies. Public functions pass it themselves, where they are not being traced.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# What reads many tokens at once stages a layer while the one before it computes: launches that do not need each other
# run side by side. In a decode step each needs the one before, and looking for others costs 1 to 2 % of it, so that
# `generate`, whose steps are in the same program as its prompts, does without.
READING_OPTIONS = COMPILER_OPTIONS | {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def program[**P, R](
    compiler_options: dict[str, Any] = COMPILER_OPTIONS, **options: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: `jax.jit` with the compiler's options, or without them where the caller is being traced itself."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        function = usual_promotion(function)
        inner = jax.jit(function, **options)
        outer = jax.jit(function, compiler_options=compiler_options, **options)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (inner if is_tracing() else outer)(*args, **kwargs)

        return call

    return decorate
