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
    pool: Any, host: Any, page_table: Any, block_ids: Any, slots: Any, *, every_layer: bool
) -> tuple[Array, ...]:
    """The five as JAX arrays that go together. every_layer: ids and slots are those of all layers."""
    require_given(pool=pool, host=host, page_table=page_table, block_ids=block_ids, slots=slots)
    (pool,), host = as_floats(pool=pool), in_host_memory("host", host)
    page_table, block_ids, slots = as_integers(page_table=page_table, block_ids=block_ids, slots=slots)
    require_shape("pool", pool, (None,) * 7, "[L, B, K, slots, parts, P, D]")
    layers, batch, kv_heads, _, parts, size, dim = pool.shape
    require_shape("host", host, (None, None, kv_heads, parts, size, dim), "[L, pages, K, parts, P, D]")
    if layers != host.shape[0] and (every_layer or layers != 1):
        rule = "must hold all layers of the store" + ("" if every_layer else ", or one")
        raise bad_value("pool", rule, f"{layers} of {host.shape[0]}", "Check the first axis.")
    require_dtype("host", host, pool.dtype, "as the pool is")
    require_shape("page_table", page_table, (batch, None), "[B, M]")
    lead, listed = ((layers,), "[L, B, K, X]") if every_layer else ((), "[B, K, X]")
    heads = 1 if block_ids.ndim == len(lead) + 3 and block_ids.shape[-2] == 1 else kv_heads
    require_shape("block_ids", block_ids, (*lead, batch, heads, None), listed)
    require_shape("slots", slots, block_ids.shape, listed)
    return pool, host, page_table, block_ids, slots


def fetch_blocks(
    pool: Float[ArrayLike, "layers B K slots parts P D"],
    host: Float[ArrayLike, "L pages K parts P D"],
    page_table: Integer[ArrayLike, "B M"],
    block_ids: Integer[ArrayLike, "B heads X"],
    slots: Integer[ArrayLike, "B heads X"],
    layer: Integer[ArrayLike, ""],
    *,
    transport: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "layers B K slots parts P D"]:
    """pool[layer, b, k, slots[b, k, x]] = host[layer, page_table[b, block_ids[b, k, x]], k] for every valid x.

    pool: the slots of all layers, or [1, ...] of this layer alone.
    host: the store, in `pinned_host` memory.
    page_table: the page of each row's blocks, modulo the pages of the store; a negative one stands for none.
    block_ids, slots: what moves where, by KV head or, with heads = 1, the same for all of them. An entry with a
        negative or too large id or slot moves nothing.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    transport: see `implementation_of`.
    implementation: "auto" or the name of one.
    """
    pool, host, *lists = _checked(pool, host, page_table, block_ids, slots, every_layer=False)
    layer = as_layer(layer, host.shape[0])
    with jax.named_scope("fetch_blocks"):
        return FETCH_BLOCKS(implementation_of(transport, implementation), pool, host, *lists, layer)


def write_back_blocks(
    host: Float[ArrayLike, "L pages K parts P D"],
    pool: Float[ArrayLike, "layers B K slots parts P D"],
    page_table: Integer[ArrayLike, "B M"],
    block_ids: Integer[ArrayLike, "*L B heads X"],
    slots: Integer[ArrayLike, "*L B heads X"],
    layer: Integer[ArrayLike, ""] | None = None,
    *,
    transport: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "L pages K parts P D"]:
    """host[l, page_table[b, block_ids[l, b, k, x]], k] = pool[l, b, k, slots[l, b, k, x]] for every valid x.

    host: in `pinned_host` memory, and so is the result. Where two entries name one page, either of them is written.
    layer: the only layer to write, with ids and slots [B, heads, X]; None for all of them. The rest as in
    `fetch_blocks`.
    """
    pool, host, *lists = _checked(pool, host, page_table, block_ids, slots, every_layer=layer is None)
    if jax.typeof(host).memory_space != jax.memory.Space.Host:
        remedy = "Move it: jax.device_put(host, jax.memory.Space.Host)."
        raise bad_value("host", "must be in pinned_host memory", "an array in device memory", remedy)
    number = None if layer is None else as_layer(layer, host.shape[0])
    with jax.named_scope("write_back_blocks"):
        return WRITE_BACK_BLOCKS(implementation_of(transport, implementation), host, pool, *lists, number)
