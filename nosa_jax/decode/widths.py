"""Few programs for any lengths: the widths that calls are padded to outside `jax.jit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.checks import is_concrete

_LEAST = 16
_PIECES = (64, 512, 4096)  # tokens that are read into running rows at once


def rounded(count: int) -> int:
    """`count` or a little more, at most an eighth from 128 on: one of eight numbers between a power of two and the
    next."""
    step = max(_LEAST, 1 << (count.bit_length() - 4) if count.bit_length() > 4 else 1)
    return -(-count // step) * step


def pieces(width: int) -> Iterator[tuple[int, int]]:
    """(begin, width) of the pieces in which `width` tokens are read into running rows, the last one padded.

    Short ones are of one size and long ones of another, so that turns of a conversation share two programs.
    """
    begin = 0
    while begin < width:
        left = width - begin
        fitting = [size for size in _PIECES if size <= left]
        size = _PIECES[0] if left <= _PIECES[0] else max(fitting[-1], _PIECES[1])
        yield begin, size
        begin += size


def padded(x: Any, width: int, fill: int = 0, axis: int = 1) -> Array:
    """`x` with `fill` after its end on `axis`; made on the host where values are known, so that nothing compiles."""
    short = width - x.shape[axis]
    if short == 0:
        return x
    pad = [(0, short if a == axis else 0) for a in range(x.ndim)]
    if is_concrete(x):
        return jnp.asarray(np.pad(np.asarray(x), pad, constant_values=fill))
    return jnp.pad(x, pad, constant_values=fill)
