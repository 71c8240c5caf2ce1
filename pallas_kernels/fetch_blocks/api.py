"""Public functions of this op; see the package docstring for the contract."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers, as_layer, in_host_memory, require_dtype
from pallas_kernels._dispatch import register
from pallas_kernels.checks import bad_value, require_given, require_shape
from pallas_kernels.fetch_blocks import triton, xla

FETCH_BLOCKS = register(
    "fetch_blocks", {"xla": xla.fetch_blocks, "triton": triton.fetch_blocks}, {"triton": triton.unsupported}
)
WRITE_BACK_BLOCKS = register(
    "write_back_blocks",
    {"xla": xla.write_back_blocks, "triton": triton.write_back_blocks},
    {"triton": triton.unsupported},
)


TRANSPORTS = ("auto", "device_put")


def implementation_of(transport: str, implementation: str = "auto") -> str:
    """The implementation that moves blocks.

    transport: "auto" leaves the choice to `implementation`, which by itself takes the kernel that reads and writes
    host memory where that can run. "device_put" is the portable transport, which is what "xla" does. Raises ValueError
    for another transport, and where both are named and disagree.
    """
    if transport not in TRANSPORTS:
        raise bad_value("transport", f"must be one of {TRANSPORTS}", repr(transport), "Pick one.")
    if transport == "auto":
        return implementation
    if implementation not in ("auto", "xla"):
        raise bad_value(
            "implementation",
            "must be 'auto' or 'xla' with transport='device_put'",
            repr(implementation),
            "Name one of the two only.",
        )
    return "xla"


def _checked(
    pool: Any, host: Any, block_ids: Any, slots: Any, *, every_layer: bool
) -> tuple[Array, Array, Array, Array]:
    """The four as JAX arrays that go together. every_layer: ids and slots are those of all layers."""
    require_given(pool=pool, host=host, block_ids=block_ids, slots=slots)
    (pool,), host = as_floats(pool=pool), in_host_memory("host", host)
    block_ids, slots = as_integers(block_ids=block_ids, slots=slots)
    require_shape("pool", pool, (None,) * 7, "[L, B, K, slots, 2, P, D]")
    layers, batch, kv_heads, _, two, size, dim = pool.shape
    require_shape("host", host, (layers, batch, kv_heads, None, two, size, dim), "[L, B, K, M, 2, P, D]")
    require_dtype("host", host, pool.dtype, "as the pool is")
    lead, listed = ((layers,), "[L, B, K, X]") if every_layer else ((), "[B, K, X]")
    require_shape("block_ids", block_ids, (*lead, batch, kv_heads, None), listed)
    require_shape("slots", slots, block_ids.shape, listed)
    return pool, host, block_ids, slots


def fetch_blocks(
    pool: Float[ArrayLike, "L B K slots 2 P D"],
    host: Float[ArrayLike, "L B K M 2 P D"],
    block_ids: Integer[ArrayLike, "B K X"],
    slots: Integer[ArrayLike, "B K X"],
    layer: Integer[ArrayLike, ""],
    *,
    transport: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "L B K slots 2 P D"]:
    """pool[layer, b, k, slots[b, k, x]] = host[layer, b, k, block_ids[b, k, x]] for every valid x.

    pool: the slots of all layers.
    host: the host store, in `pinned_host` memory.
    block_ids, slots: what moves where. An entry with a negative or too large id or slot moves nothing.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    transport: see `implementation_of`.
    implementation: "auto" or the name of one.
    """
    pool, host, block_ids, slots = _checked(pool, host, block_ids, slots, every_layer=False)
    layer = as_layer(layer, pool.shape[0])
    with jax.named_scope("fetch_blocks"):
        return FETCH_BLOCKS(implementation_of(transport, implementation), pool, host, block_ids, slots, layer)


def write_back_blocks(
    host: Float[ArrayLike, "L B K M 2 P D"],
    pool: Float[ArrayLike, "L B K slots 2 P D"],
    block_ids: Integer[ArrayLike, "L B K X"],
    slots: Integer[ArrayLike, "L B K X"],
    *,
    transport: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "L B K M 2 P D"]:
    """host[l, b, k, block_ids[l, b, k, x]] = pool[l, b, k, slots[l, b, k, x]] for every valid x, of all layers.

    host: in `pinned_host` memory, and so is the result. transport: see `implementation_of`.
    """
    pool, host, block_ids, slots = _checked(pool, host, block_ids, slots, every_layer=True)
    if jax.typeof(host).memory_space != jax.memory.Space.Host:
        remedy = "Move it: jax.device_put(host, jax.memory.Space.Host)."
        raise bad_value("host", "must be in pinned_host memory", "an array in device memory", remedy)
    with jax.named_scope("write_back_blocks"):
        return WRITE_BACK_BLOCKS(implementation_of(transport, implementation), host, pool, block_ids, slots)
