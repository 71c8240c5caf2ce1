"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import functools

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers, as_layer, as_scale, in_host_memory, require_dtype
from pallas_kernels._dispatch import register
from pallas_kernels.checks import bad_value, require_given, require_shape, require_type
from pallas_kernels.decode_attention import triton, xla
from pallas_kernels.decode_attention.arguments import Residence, Store, Token
from pallas_kernels.fetch_blocks import implementation_of

DECODE_ATTENTION = register(
    "decode_attention",
    {"xla": xla.decode_attention, "triton": triton.decode_attention},
    {"triton": triton.unsupported},
)

UPDATE_AND_ATTEND = register(
    "update_and_attend",
    {"xla": xla.update_and_attend, "triton": triton.update_and_attend},
    {"triton": triton.update_unsupported},
)


def decode_attention(
    q: Float[ArrayLike, "B N D"],
    pool: Float[ArrayLike, "L B K slots 2 P D"],
    bias: Float[ArrayLike, "L B K M P"] | None,
    slots: Integer[ArrayLike, "B K J"],
    block_ids: Integer[ArrayLike, "B K J"],
    positions: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N D"]:
    """Attention of one query token per row over the blocks that lie in `slots` of the device pool.

    q: the queries, one token per row.
    pool: K (index 0) and V (index 1) of each block.
    bias: per token of each block, float32, added after scaling; None for none.
    slots: block_ids[b, k, j] lies in slots[b, k, j].
    block_ids: ascending, -1 padding.
    positions: of the queries; later tokens are masked.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    scale: of the logits, 1/sqrt(D) by default.

    Returns the dtype of q; accumulates in float32. Raises ValueError or TypeError for arguments that do not go
    together.
    """
    require_given(q=q, pool=pool, slots=slots, block_ids=block_ids, positions=positions, layer=layer)
    q, pool, bias = as_floats(q=q, pool=pool, bias=bias)
    slots, block_ids, positions = as_integers(slots=slots, block_ids=block_ids, positions=positions)
    _check(q, pool, bias, slots, block_ids, positions)
    layer, scale = as_layer(layer, pool.shape[0]), as_scale(scale, q.shape[-1])
    with jax.named_scope("decode_attention"):
        return DECODE_ATTENTION(implementation, q, pool, bias, slots, block_ids, positions, layer, scale=scale)


def update_and_attend(
    token: Token,
    store: Store,
    residence: Residence,
    positions: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    *,
    scale: float | None = None,
    transport: str = "auto",
    implementation: str = "auto",
) -> tuple[Float[Array, "B N D"], Float[Array, "L B K slots 2 P D"]]:
    """What a decode step does to one layer's pool, and its attention: returns (output, pool).

    The blocks that are missing cross from the host store into their slots, the key and value of the new token go to
    their place in the slot of its block, and `decode_attention` runs over the pool. The output has the bits of
    `decode_attention` over the same pool.

    token: what is new. store: where keys and values are; `store.pool` is updated. residence: the selected blocks.
    positions: of the new token, -1 for rows without one.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    scale: of the logits, 1/sqrt(D) by default.
    transport: how blocks cross, "auto" or "device_put", which moves them so whatever implementation attends.
    Raises ValueError or TypeError for arguments that do not go together, and for a host store without loads or
    page table.
    """
    for name, value, kind in (("token", token, Token), ("store", store, Store), ("residence", residence, Residence)):
        require_type(name, value, kind, f"Pass pallas_kernels.{kind.__name__}(...).")
    token = Token(*as_floats(**{f"token.{name}": x for name, x in token._asdict().items()}))
    pool, bias = as_floats(**{"store.pool": store.pool, "store.bias": store.bias})
    host = None if store.host is None else in_host_memory("store.host", store.host)
    (page_table,) = as_integers(**{"store.page_table": store.page_table})
    store = Store(pool, host, page_table, bias)
    residence = Residence(*as_integers(**{f"residence.{name}": x for name, x in residence._asdict().items()}))
    block_ids, slots, loads = residence
    (positions,) = as_integers(positions=positions)
    _check(token.q, pool, bias, slots, block_ids, positions, ("token.", "store.", "residence."))
    layers, batch, kv_heads, _, two, size, dim = pool.shape
    require_shape("token.k", token.k, (batch, kv_heads, dim), "[B, K, D]")
    require_shape("token.v", token.v, token.k.shape, "[B, K, D]")
    if host is not None:
        require_shape("store.host", host, (layers, None, kv_heads, two, size, dim), "[L, pages, K, 2, P, D]")
        if page_table is None:
            raise bad_value("store.page_table", "must be given with store.host", None, "Pass the page of each block.")
        require_shape("store.page_table", page_table, (batch, None), "[B, M]")
        if loads is None:
            raise bad_value(
                "residence.loads", "must be given with store.host", loads, "Pass -1 for blocks that are resident."
            )
        require_dtype("store.host", host, pool.dtype, "as the pool is")
        require_shape("residence.loads", loads, block_ids.shape, "[B, K, J]")
    layer, scale = as_layer(layer, pool.shape[0]), as_scale(scale, dim)
    with jax.named_scope("update_and_attend"):
        if implementation_of(transport) == "auto":
            return UPDATE_AND_ATTEND(implementation, token, store, residence, positions, layer, scale=scale)
        attend = functools.partial(DECODE_ATTENTION, implementation)
        return xla.update_and_attend(token, store, residence, positions, layer, scale=scale, attend=attend)


def _check(
    q: Array,
    pool: Array,
    bias: Array | None,
    slots: Array,
    block_ids: Array,
    positions: Array,
    owners: tuple[str, str, str] = ("", "", ""),
) -> None:
    """owners: what messages put before the names of q, of pool and bias, and of slots and ids."""
    token, store, residence = owners
    require_shape(f"{token}q", q, (None,) * 3, "[B, N, D]")
    require_shape(f"{store}pool", pool, (None,) * 7, "[L, B, K, slots, 2, P, D]")
    batch, heads, dim = q.shape
    layers, _, kv_heads, _, _, size, _ = pool.shape
    require_shape(f"{store}pool", pool, (layers, batch, kv_heads, None, 2, size, dim), "[L, B, K, slots, 2, P, D]")
    require_shape(f"{residence}block_ids", block_ids, (batch, kv_heads, None), "[B, K, J]")
    require_shape(f"{residence}slots", slots, block_ids.shape, "[B, K, J]")
    require_shape("positions", positions, (batch,), "[B]")
    if heads % kv_heads:
        raise bad_value(
            f"{token}q", "must have a multiple of K heads", f"N={heads}, K={kv_heads}", "Check the head axis."
        )
    if bias is not None:
        require_shape(f"{store}bias", bias, (layers, batch, kv_heads, None, size), "[L, B, K, M, P]")
