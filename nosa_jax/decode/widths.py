"""Few programs for any lengths: the widths that calls are padded to outside `jax.jit`."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.checks import is_concrete

_PIECES = (64, 512, 4096)  # tokens that are read into running rows at once


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


def padded(tokens: Array, width: int) -> Array:
    """Tokens [B, T] with zeros after them, where they were.

    Made on the host where that is possible, so that nothing compiles: of arrays that nobody has put anywhere.
    """
    if tokens.shape[1] == width:
        return tokens
    pad = ((0, 0), (0, width - tokens.shape[1]))
    if is_concrete(tokens) and not tokens.committed:
        return jnp.asarray(np.pad(np.asarray(tokens), pad))
    return jnp.pad(tokens, pad)
