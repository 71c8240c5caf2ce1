"""What belongs together among the arguments of `rebuilt_attention`.

Shapes: L layers, B rows, U chunks of a prompt, c tokens of a chunk, r rank, K KV heads, D head dim, S positions, s
listed chunks, E exact tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class Factors(NamedTuple):
    """Keys before RoPE, tokens [c, r] times heads [r, D] of each chunk and head; cos, sin: float32, of every position,
    of which token t of chunk i has i * c + t."""

    tokens: Float[Array, "L B U c r"]
    heads: Float[Array, "L B K r D"]
    cos: Float[Array, "S half"]
    sin: Float[Array, "S half"]


class Chunks(NamedTuple):
    """The chunks to attend to. ids: -1 for none, at any place. slots: the values of ids[b, k, j] lie in slot
    slots[b, k, j] of the pool."""

    pool: Float[Array, "L B K slots 1 c D"]
    ids: Int32[Array, "B K s"]
    slots: Int32[Array, "B K s"]


class Exact(NamedTuple):
    """Tokens whose keys, after RoPE, and values are kept as they are: tokens[:, :, :, 0] and tokens[:, :, :, 1]. The
    first `lengths` of each row are attended to."""

    tokens: Float[Array, "L B K 2 E D"]
    lengths: Int32[Array, " B"]
