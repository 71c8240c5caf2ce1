"""Few programs for any lengths: the widths that calls are padded to outside `jax.jit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

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


def padded(tokens: Any, width: int) -> Any:
    """Tokens [B, T] with zeros after them; made on the host where values are known, so that nothing compiles."""
    if tokens.shape[1] == width:
        return tokens
    pad = ((0, 0), (0, width - tokens.shape[1]))
    return jnp.asarray(np.pad(np.asarray(tokens), pad)) if is_concrete(tokens) else jnp.pad(tokens, pad)
