"""Prompts and decode steps in a cache that a policy decides on: what it says put into the state, and the host store.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.cache.state import DecodeState, sizes_of
from nosa_jax.cache.summaries import summaries_of
from nosa_jax.policy import Stepped, Store
from pallas_kernels import append_token, blocks, write_back_blocks


def put_prompt(
    state: DecodeState,
    k_pre: Float[Array, "B K T D"],
    k_post: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    q_last: Float[Array, "B N D"],
    count: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[DecodeState, Int32[Array, "B K J"]]:
    """One layer of prompts into empty rows, and the units that their last queries want.

    count: tokens of each row; one with none stays as it is. The rest: see `Policy.read_prompt`.
    """
    assert state.policy is not None
    lengths = jnp.maximum(count, 1)
    new = state.policy.read_prompt(k_pre, k_post, v, q_last, lengths, sizes_of(state))

    def put(whole: Array, part: Array) -> Array:
        """The part in its layer, of the rows that are there, from the first place of each axis on."""
        start = blocks.slice_start(layer, *(0,) * part.ndim)
        old = jax.lax.dynamic_slice(whole, start, (1, *part.shape))[0]
        grows = (count > 0).reshape(-1, *(1,) * (part.ndim - 1))
        return jax.lax.dynamic_update_slice(whole, jnp.where(grows, part, old)[None], start)

    kept = jax.tree.map(put, state.kept, new.kept)
    if state.host is None:
        return dataclasses.replace(state, pool=put(state.pool, new.units), kept=kept), new.ids
    units = jnp.arange(new.units.shape[2], dtype=jnp.int32)
    stored = jnp.where(units < jnp.where(count > 0, new.stored, 0)[:, None], units, -1)[:, None]
    host = write_back_blocks(
        state.host, new.units[None], state.page_table, stored, stored, layer, transport=state.transport
    )
    row, head = jnp.arange(v.shape[0])[:, None, None], jnp.arange(v.shape[1])[:, None]
    held = new.units[row, head, jnp.maximum(new.resident, 0)]
    return dataclasses.replace(state, host=host, pool=put(state.pool, held), kept=kept), new.ids


def attend_token(
    state: DecodeState,
    qkv: Float[Array, "B K G_plus_2 D"],
    cos_sin: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    rotations: Any,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[DecodeState, Stepped]:
    """One new token per row: the state with it, and what the policy did; see `Policy.decode`."""
    assert state.policy is not None
    q, k, v, _ = append_token(qkv, *cos_sin, None, None, summaries_of(state), positions, layer, stride=1)
    store = Store(state.pool, state.host, state.page_table, state.transport)
    step = state.policy.decode(state.kept, store, rotations, (q, k, v), positions, layer)
    return dataclasses.replace(state, pool=step.pool, kept=step.kept), step


def write_back(state: DecodeState, positions: Int32[Array, " B"]) -> DecodeState:
    """Copies the units that the tokens at `positions` (-1 for none) filled to the host store, in all layers."""
    assert state.policy is not None
    if state.host is None or (filled := state.policy.filled(state.kept, positions)) is None:
        return state
    host = write_back_blocks(state.host, state.pool, state.page_table, *filled, transport=state.transport)
    return dataclasses.replace(state, host=host)
