"""The decode state: one pytree that holds everything a running batch has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from nosa_jax import parallel
from nosa_jax._pytree import pytree_dataclass, short_repr, static_field
from nosa_jax.cache import host_store
from nosa_jax.cache.pages import Rooms, own_rooms
from nosa_jax.cache.slots import EMPTY, SlotTable, empty_table
from nosa_jax.config import CacheConfig, ModelConfig
from nosa_jax.policy import Policy, Sizes
from pallas_kernels import blocks
from pallas_kernels.checks import as_integers, bad_value, is_concrete, require_int, require_shape, require_size


class PooledCache(NamedTuple):
    """pooled [L, B, K, C, D]: means of the complete windows. sums [L, B, K, 2, D] float32: the last complete stride and
    the open one."""

    pooled: Float[Array, "L B K C D"]
    sums: Float[Array, "L B K 2 D"]

    def __repr__(self) -> str:
        return short_repr(self)


@pytree_dataclass
class DecodeState:
    """A running batch; every row has its own length.

    pool: [L, B, K, slots, 2, P, D], blocks on the device (index 0: K, 1: V). Without offload, slot = block id.
    host: [L, pages, K, 2, P, D] in pinned_host; holds every full block. None without offload.
    page_table: int32 [B, M], the page of each row's blocks in all layers, -1 for none. None without offload.
    table: which block lies in which slot. None without offload.
    pooled_keys: None where the variant does not score by query.
    importance: [L, B, K, M, P] float32, the bias of each token. None without bias.
    pooled_importance: the same pooled over windows, D = 1.
    lengths: int32 [B], tokens in the cache.
    limits: int32 [B], tokens that each row may grow to.
    max_length: the most that any row's limit may ever be (static): it makes M. transport: see CacheConfig (static).
    kept: what the policy keeps beside the pool, arrays [L, B, ...] that it alone looks into; None without one.
    policy: see CacheConfig (static). With one, pool and host hold its units: [L, B, K, slots, parts, unit, D] and
        [L, pages, K, parts, unit, D], and M counts those of a row; there is neither table, summary nor importance.

    Memory that no token has reached may hold anything, NaN included.
    """

    pool: Any
    host: Any
    page_table: Any
    table: Any
    pooled_keys: Any
    importance: Any
    pooled_importance: Any
    lengths: Any
    limits: Any
    max_length: int = static_field()
    transport: str = static_field()
    kept: Any = None
    policy: Policy | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def block_size(self) -> int:
        """P, tokens of a block."""
        return self.pool.shape[5]

    @property
    def num_slots(self) -> int:
        """Blocks of a row, layer and KV head that are on the device."""
        return self.pool.shape[3]

    @property
    def num_blocks(self) -> int:
        """M, blocks that any row may fill."""
        return self.num_slots if self.page_table is None else self.page_table.shape[1]


def empty_state(
    config: ModelConfig,
    batch: int,
    max_length: int,
    cache: CacheConfig,
    dtype: Any,
    rooms: Rooms | None = None,
    pages: int | None = None,
    sizes: Sizes | None = None,
) -> DecodeState:
    """The state of `batch` empty rows; call it under `jax.jit`, so that the host store needs no device memory.

    max_length: the most that any row may ever hold.
    rooms: what each row may grow to, and its pages; None where they are the whole batch, and alike.
    pages: of the host store; None for one per block of every row.
    sizes: of what the cache's policy keeps, see `policy_sizes`; None without one.
    """
    if cache.policy is not None:
        assert sizes is not None
        return _empty_by_policy(cache.policy, sizes, cache, dtype, rooms)
    attention = config.attention
    size, stride, dim = attention.block_size, attention.pooling_stride, config.head_dim
    m = blocks.num_blocks(max_length, size)
    slots = cache.resolve_slots(attention, m)
    lead = (config.num_layers, batch, config.num_kv_heads)
    block = (2, size, dim)
    rooms = own_rooms(batch, max_length, size) if rooms is None else rooms
    pages = batch * m if pages is None else pages

    def pooled(width: int, dtype: Any) -> PooledCache:
        windows = blocks.num_windows(m * size, stride)
        return PooledCache(jnp.zeros((*lead, windows, width), dtype), jnp.zeros((*lead, 2, width), jnp.float32))

    return DecodeState(
        pool=jnp.zeros((*lead, m if slots is None else slots, *block), dtype),
        host=None if slots is None else host_store.allocate((lead[0], pages, lead[2], *block), dtype),
        page_table=None if slots is None else rooms.page_table,
        table=None if slots is None else empty_table((*lead, slots)),
        pooled_keys=pooled(dim, dtype) if attention.uses_query_scores else None,
        importance=jnp.zeros((*lead, m, size), jnp.float32) if attention.uses_importance else None,
        pooled_importance=pooled(1, jnp.float32) if attention.uses_importance else None,
        lengths=jnp.zeros((batch,), jnp.int32),
        limits=rooms.limits,
        max_length=max_length,
        transport=cache.transport,
    )


def policy_sizes(config: ModelConfig, batch: int, max_length: int, prompt: int, new: int) -> Sizes:
    """What decides the shapes of a policy's cache. prompt: the longest, with its padding. new: tokens to generate."""
    return Sizes(config.num_layers, batch, config.num_kv_heads, config.head_dim, prompt, new, max_length)


def sizes_of(state: DecodeState) -> Sizes:
    """Those of a state with a policy."""
    assert state.policy is not None
    layers, rows, heads, *_, dim = state.pool.shape
    own = {"prompt": 0, "new": 0} | state.policy.sizes_of(state.kept)
    return Sizes(layers, rows, heads, dim, max_length=state.max_length, **own)


def _empty_by_policy(policy: Policy, sizes: Sizes, cache: CacheConfig, dtype: Any, rooms: Rooms | None) -> DecodeState:
    """`empty_state` with a policy: every row has a page for each of its units, whatever its limit."""
    layers, batch, heads, dim = sizes[:4]
    units = policy.num_units(sizes)
    own = own_rooms(batch, units * policy.unit, policy.unit)
    limits = own_rooms(batch, sizes.max_length, policy.unit).limits if rooms is None else rooms.limits
    unit = (policy.parts, policy.unit, dim)
    slots = policy.num_slots if cache.offload else units
    return DecodeState(
        pool=jnp.zeros((layers, batch, heads, slots, *unit), dtype),
        host=host_store.allocate((layers, batch * units, heads, *unit), dtype) if cache.offload else None,
        page_table=own.page_table if cache.offload else None,
        table=None,
        pooled_keys=None,
        importance=None,
        pooled_importance=None,
        lengths=jnp.zeros((batch,), jnp.int32),
        limits=limits,
        max_length=sizes.max_length,
        transport=cache.transport,
        kept=policy.empty(sizes, dtype),
        policy=policy,
    )


@functools.lru_cache(maxsize=32)
def policy_shapes(sizes: Sizes, cache: CacheConfig, dtype: Any) -> dict[str, Any]:
    """`fields_of` an empty state with a policy, as shapes."""
    policy = cache.policy
    assert policy is not None
    return fields_of(jax.eval_shape(lambda: _empty_by_policy(policy, sizes, cache, dtype, None)))


def policy_bytes(sizes: Sizes, cache: CacheConfig, dtype: Any) -> tuple[dict[str, int], int, int]:
    """What a policy's cache takes on the device, by part; in host memory; and what of it a step reads."""
    policy = cache.policy
    assert policy is not None
    state = policy_shapes(sizes, cache, dtype)
    size = lambda part: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))
    kept = {name.replace("_", " "): size(part) for name, part in vars(state["kept"]).items()}
    read = policy.read_bytes(state["kept"]) + size(state["pool"]) // state["pool"].shape[3] * policy.num_slots
    tables = size(state["page_table"]) + size((state["lengths"], state["limits"]))
    return {"pool": size(state["pool"]), **kept, "tables": tables}, size(state["host"]), read


def specs(state: DecodeState) -> DecodeState:
    """How a state, or shapes of one, lies on a mesh: by rows."""
    placed: DecodeState = jax.tree.map(lambda _: PartitionSpec(None, parallel.ROWS), state)
    rows = PartitionSpec(parallel.ROWS)
    return dataclasses.replace(placed, lengths=rows, limits=rows, page_table=None if state.page_table is None else rows)


def device_bytes(state: DecodeState) -> int:
    """What the state takes in device memory."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(dataclasses.replace(state, host=None)))


def rows_of(state: DecodeState, first: Int32[Array, ""], count: int) -> DecodeState:
    """The state of `count` rows alone. The host store stays whole: the pages of these rows are theirs."""
    cut = lambda axis: lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis)
    return _by_rows(cut, state)


def with_rows(state: DecodeState, part: DecodeState, first: Int32[Array, ""]) -> DecodeState:
    """`state` with the rows of `part` in the place of those from `first` on."""
    put = lambda axis: lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, axis)
    return dataclasses.replace(_by_rows(put, state, part), host=part.host)


def _by_rows(function: Callable[[int], Callable[..., Array]], state: DecodeState, *others: DecodeState) -> DecodeState:
    """`function(axis of rows)` of every array but the host store."""
    names = [name for name in fields_of(state) if name != "host"]
    axes = {name: 0 if name in ("lengths", "limits", "page_table") else 1 for name in names}
    parts = {
        name: jax.tree.map(function(axes[name]), *(getattr(each, name) for each in (state, *others))) for name in names
    }
    return dataclasses.replace(state, **parts)


def page_range(state: DecodeState, row: int) -> range:
    """The pages of the host store that a row may have: all, or on a mesh those of the row's device."""
    pages, rows = state.host.shape[1], state.lengths.shape[0]
    devices = 1
    if is_concrete(state.host):
        devices = pages // state.host.sharding.shard_shape(state.host.shape)[1]
    first = row // (rows // devices) * (pages // devices)
    return range(first, first + pages // devices)


def with_pages(state: DecodeState, row: Any, ids: Any, limit: Any) -> DecodeState:
    """`state` with one row empty and with other pages, so that `extend` can fill it anew; the other rows stay.

    row: which row, an int or an int32 scalar.
    ids: int [n], the pages of its first n blocks, n <= M; None without a host store. Nothing else may own them but rows
        that begin with the same blocks, see `Pages`.
    limit: tokens that it may grow to, at most n * P and `state.max_length`; 0 for a row that rests.

    It computes as a row of a fresh state does, to the bit. Nothing of the pool and of the host store is touched.
    Raises TypeError or ValueError for what does not fit, a state with a policy included, whose rows begin with a
    prompt; what is traced is not looked at.
    """
    if state.policy is not None:
        name = type(state.policy).__name__
        raise bad_value("state", "must have no policy, as rows of one begin with a prompt", name, "Prefill anew.")
    rows, size, num_blocks = state.lengths.shape[0], state.block_size, state.num_blocks
    row = require_size("row", row, 0, rows - 1) if is_concrete(row) else row
    table = state.page_table
    room = state.max_length
    if (table is None) != (ids is None):
        rule = "must be None without a host store" if table is None else "must be the row's pages"
        raise bad_value("ids", rule, f"{ids!r:.60}", "Pass what the state has.")
    if table is not None:
        ids = as_integers("ids", ids)
        require_shape("ids", ids, (None,), "[n]")
        if is_concrete(row, ids):
            _require_pages(np.asarray(ids), page_range(state, row))
        room = min(room, ids.shape[0] * size)
    if is_concrete(limit):
        limit = require_int("limit", limit, 0)
        if limit > room:
            rule = f"must be at most {room}, what the row's pages hold and max_length = {state.max_length} allows"
            raise bad_value("limit", rule, limit, "Lower it, or give the row more pages.")
    at = jnp.arange(rows, dtype=jnp.int32) == row
    # By `where` and not by index, which on a mesh of Explicit axes needs to be told how its result lies.
    along = lambda x: at.reshape(1, -1, *(1,) * (x.ndim - 2))
    put = lambda x, value: jnp.where(along(x), value, x)
    # The sums of the open window are added to, so they begin anew; all else is written before it is read.
    reset = lambda pooled: None if pooled is None else pooled._replace(sums=put(pooled.sums, jnp.float32(0)))
    return dataclasses.replace(
        state,
        page_table=None if table is None else jnp.where(at[:, None], _padded(ids, num_blocks), table),
        table=None if state.table is None else SlotTable(*(put(x, jnp.int32(EMPTY)) for x in state.table)),
        pooled_keys=reset(state.pooled_keys),
        pooled_importance=reset(state.pooled_importance),
        lengths=jnp.where(at, 0, state.lengths),
        limits=jnp.where(at, jnp.clip(jnp.int32(limit), 0, room), state.limits),
    )


def _padded(ids: Int32[Array, " n"], num_blocks: int) -> Int32[Array, " M"]:
    """One row of a page table. Raises ValueError for more pages than it has room for."""
    if ids.shape[0] > num_blocks:
        remedy = "Give it fewer, or prefill with a larger max_length."
        raise bad_value("ids", f"a row may have at most M = {num_blocks} pages", ids.shape[0], remedy)
    return jnp.pad(ids, (0, num_blocks - ids.shape[0]), constant_values=-1)


def _require_pages(ids: np.ndarray, pages: range) -> None:
    """Raises ValueError unless these are distinct pages of a row's device."""
    wrong = ids[(ids < pages.start) | (ids >= pages.stop)]
    if wrong.size:
        rule = f"must be pages of the row's store, in [{pages.start}, {pages.stop})"
        raise bad_value("ids", rule, wrong[0], "Take them from its `Pages`.")
    if len(np.unique(ids)) < ids.size:
        raise bad_value("ids", "must be distinct", ids.tolist(), "Give every block a page of its own.")


def fields_of(state: DecodeState) -> dict[str, Any]:
    """What of a state, or of shapes of one, holds arrays, by name."""
    names = (
        field.name for field in dataclasses.fields(state) if field.name not in ("max_length", "transport", "policy")
    )
    return {name: getattr(state, name) for name in names}


def table_at(state: DecodeState, layer: Array) -> SlotTable:
    return SlotTable(*(x[layer] for x in state.table))


def put_table(state: DecodeState, table: SlotTable, layer: Array) -> SlotTable:
    """The stacked tables with one layer's replaced."""
    put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)
    return SlotTable(*map(put, state.table, table))
