"""Transport by a Pallas-Triton kernel that reads and writes pinned host memory itself: one launch per direction."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend

_PROGRAMS = 8  # per row and KV head; few, since a layer moves few blocks, and enough to fill the link at any batch
_WARPS = 8


def move_block(source, target, at, from_, to):
    """In a kernel: target[*at, to] = source[*at, from_], where both are blocks. at: layer, row and KV head."""

    @_backend.when((from_ >= 0) & (from_ < source.shape[3]) & (to >= 0) & (to < target.shape[3]))
    def _():
        target[(*at, to)] = source[(*at, from_)]


def _move_kernel(layer, sources, targets, source, _, target, *, programs):
    """target[l, b, k, targets[x]] = source[l, b, k, sources[x]]; every program takes each `programs`-th x.

    layer: of ids [B, K, X]; None for ids [L, B, K, X], of all layers.
    """
    program, head, row = (_backend.program_id(axis) for axis in range(3))
    number = program // programs if layer is None else _backend.layer_index(layer, source)
    at = number, row, head
    listed = at if layer is None else at[1:]

    def body(trip, carry):
        entry = (*listed, trip * programs + program % programs)
        move_block(source, target, at, sources[entry], targets[entry])
        return carry

    jax.lax.fori_loop(0, sources.shape[-1] // programs, body, 0)


def _move(source: Array, target: Array, sources: Array, targets: Array, layer: Array | None) -> Array:
    """The target with the blocks that move, in place where the target is donated."""
    programs = min(_PROGRAMS, _backend.next_power_of_two(sources.shape[-1]))
    sources, targets = (_backend.pad_to_multiple(x, x.ndim - 1, programs, -1) for x in (sources, targets))
    lead = 1 if layer is not None else len(sources)
    operands = (None if layer is None else jax.lax.reshape(layer, (1,)), sources, targets, source, target)

    def kernel(*refs: Any) -> None:
        _move_kernel(*refs, programs=programs)

    return _backend.triton_call(
        kernel,
        name="move_blocks",
        grid=(lead * programs, *sources.shape[-2:-4:-1]),
        out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
        num_warps=_WARPS,
        aliases={sum(x is not None for x in operands) - 1: 0},
    )(*operands)


def unsupported(target: Array, source: Array, *ids: Any) -> str | None:
    """Why these arguments cannot take the kernel; None where they can."""
    for size in source.shape[5:]:
        if not _backend.is_power_of_two(size):
            return f"tokens per block and head dim must be powers of two, got {list(source.shape[5:])}"
    return None


def fetch_blocks(
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K slots 2 P D"]:
    return _move(host, pool, block_ids, slots, layer)


def write_back_blocks(
    host: Float[Array, "L B K M 2 P D"],
    pool: Float[Array, "L B K slots 2 P D"],
    block_ids: Int32[Array, "L B K X"],
    slots: Int32[Array, "L B K X"],
) -> Float[Array, "L B K M 2 P D"]:
    # Moves nothing: it gives the result back the type of an array in host memory.
    return jax.device_put(_move(pool, host, slots, block_ids, None), jax.memory.Space.Host)
