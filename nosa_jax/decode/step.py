"""One token more for every row, as a pure function from state to state."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax import parallel, rope
from nosa_jax._pytree import pytree_dataclass
from nosa_jax.attention import layout
from nosa_jax.attention.layer import Attention
from nosa_jax.cache import by_policy, residence
from nosa_jax.cache.state import DecodeState, specs
from nosa_jax.config import ModelConfig
from nosa_jax.decode import checks
from nosa_jax.decode.program import program
from nosa_jax.model import NosaLM
from nosa_jax.policy import Policy
from nosa_jax.rope import Rotations
from pallas_kernels.checks import IntegersLike
from pallas_kernels.device import current_device
from pallas_kernels.promotion import usual_promotion

_ROWS = 8  # of which the operands of a matrix product have a multiple


@pytree_dataclass
class StepOutput:
    """logits [B, V] float32 after the last token; block_ids [L, B, K, J] its selection (None for `full` without a
    policy); fetched [L, B, K] blocks that crossed from the host for it (None there, too)."""

    logits: Any
    block_ids: Any
    fetched: Any


def selected_units(config: ModelConfig, policy: Policy | None) -> int | None:
    """J, of what a step selects; None where it reads everything."""
    if policy is not None:
        return policy.num_wanted
    return config.attention.num_selected_blocks if config.attention.is_sparse else None


def output_specs(config: ModelConfig, policy: Policy | None) -> StepOutput:
    """How a StepOutput lies on a mesh: by rows."""
    rows, of_layers = PartitionSpec(parallel.ROWS), PartitionSpec(None, parallel.ROWS)
    return (
        StepOutput(rows, None, None) if selected_units(config, policy) is None else StepOutput(rows, *[of_layers] * 2)
    )


def decode_step(model: NosaLM, state: DecodeState, tokens: IntegersLike) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Feeds one token to every row. Returns the new state and the float32 logits of what follows.

    A plain function of int tokens [B]; `jit_decode_step` is it compiled for a loop. Under jit, where values cannot be
    checked, a row that has reached its limit stays as it is, and its logits are NaN; so are those of an id out of the
    vocabulary. On a mesh every device does its own rows, with weights as `prefill` has them. Raises TypeError or
    ValueError for a state of another model, wrong shapes and, outside jit, wrong values.
    """
    checks.check_model(model)
    tokens = layout.as_tokens(tokens, model.config.vocab_size, rank=1)
    checks.check_state(model, state, tokens.shape[0])
    checks.check_room(state, 1)
    return _plain_step(*checks.untransformed((model, state, tokens)))


def jit_decode_step(model: NosaLM, state: DecodeState, tokens: IntegersLike) -> tuple[DecodeState, Float[Array, "B V"]]:
    """`decode_step` compiled with the options that it needs, the state donated: go on with the state that it returns.

    The state passed in is gone afterwards. The call does not wait for the step before, so values are looked at only
    where tokens come from NumPy or a list: a row that has reached its limit stays as it is, and its logits are NaN; so
    are those of an id out of the vocabulary. Raises TypeError or ValueError for a state of another model and wrong
    tokens.
    """
    checks.check_model(model)
    look = not isinstance(tokens, jax.Array)
    tokens = layout.as_tokens(tokens, model.config.vocab_size, rank=1, look=look)
    checks.check_state(model, state, tokens.shape[0])
    return _donating_step(*checks.untransformed((model, state, tokens)))


def _step(model: NosaLM, state: DecodeState, tokens: Int32[Array, " B"]) -> tuple[DecodeState, Float[Array, "B V"]]:
    """A step for loops that cannot look at values: what must not be gone on from is NaN."""
    rows, of_state = PartitionSpec(parallel.ROWS), specs(state)
    arguments, given = (model, state, tokens), (PartitionSpec(), of_state, rows)
    return parallel.by_rows(parallel.mesh_of(*arguments), _step_of_rows, arguments, given, (of_state, rows))


def _step_of_rows(
    model: NosaLM, state: DecodeState, tokens: Int32[Array, " B"]
) -> tuple[DecodeState, Float[Array, "B V"]]:
    usable = (state.lengths < state.limits) & (tokens >= 0) & (tokens < model.config.vocab_size)
    state, out = run_step(model, state, tokens)
    return state, jnp.where(usable[:, None], out.logits, jnp.nan)


_plain_step = program()(_step)
_donating_step = program(donate_argnames="state")(_step)


class Place(NamedTuple):
    """Where the new tokens of a step stand, the same for all layers.

    positions: int32 [B], -1 where a row has no token. cos_sin: float32 [B, D/2] each, see `rope.cos_sin`. rotations:
    those of the prompt's positions that a policy needs; None without one.
    """

    positions: Int32[Array, " B"]
    cos_sin: tuple[Float[Array, "B half"], Float[Array, "B half"]]
    rotations: Rotations | None = None


def place_of(config: ModelConfig, positions: Int32[Array, " B"]) -> Place:
    """The place of tokens at `positions`."""
    cos, sin = rope.of_positions(config, jnp.maximum(positions, 0)[:, None])
    return Place(positions, (cos[:, 0], sin[:, 0]))


def _rotations(config: ModelConfig, state: DecodeState) -> Rotations | None:
    if state.policy is None or (rotated := state.policy.rotated(state.kept)) == 0:
        return None
    cos, sin = rope.of_positions(config, jnp.arange(rotated, dtype=jnp.int32)[None])
    return Rotations(cos[0], sin[0])


def attend_token(
    model: NosaLM,
    qkv: Float[Array, "B K G_plus_2 D"],
    state: DecodeState,
    place: Place,
    forced_block_ids: Int32[Array, "L B K J"] | None,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B N D"], tuple[DecodeState, tuple[Int32[Array, "B K J"], Int32[Array, "B K"] | None] | None]]:
    """Attention of one new token per row: select, make resident, write the token, attend.

    qkv: the token's projections in this layer, see `Attention.heads`. forced_block_ids: see `append_and_select`.
    Returns the output of all heads, and the state with what was selected and how many blocks were fetched (None for
    `full`).
    """
    config, positions = model.config, place.positions
    if state.policy is not None:
        state, step = by_policy.attend_token(state, qkv, place.cos_sin, place.rotations, positions, layer)
        return step.out, (state, (step.ids, step.fetched))
    importance = model.layers.attention.importance if config.attention.uses_importance else None
    state, token, resident, count = residence.admit_token(
        config.attention, state, qkv, place.cos_sin, importance, positions, layer, forced_block_ids
    )
    state, out = residence.attend(state, token, resident, positions, layer)
    return out, (state, (resident.block_ids, count) if config.attention.is_sparse else None)


@jax.jit
@usual_promotion
def run_step(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, " B"],
    active: Bool[Array, " B"] | None = None,
    forced_block_ids: Int32[Array, "L B K J"] | None = None,
) -> tuple[DecodeState, StepOutput]:
    """One token for every active row; the others stay as they are.

    forced_block_ids: replace the selection, see `append_and_select`.
    """
    config, batch = model.config, tokens.shape[0]
    room = state.lengths < state.limits
    active = room if active is None else room & active
    place = place_of(config, jnp.where(active, state.lengths, -1))._replace(rotations=_rotations(config, state))

    def body(index: Array, carry: tuple[Array, DecodeState, Any]) -> tuple[Array, DecodeState, Any]:
        index = index.astype(jnp.int32)  # under x64 a loop counts in int64
        x, state, recorded = carry

        def attend(attention: Attention, x: Float[Array, "rows 1 H"]) -> tuple[Array, Any]:
            qkv = attention.heads(config, x[:, 0])[:batch]
            out, rest = attend_token(model, qkv, state, place, forced_block_ids, index)
            return attention.merge(_with_padding(out)[:, None]), rest

        x, (state, of_layer) = model.layers.block(config, x, attend, index)
        return x, state, jax.tree.map(lambda whole, part: whole.at[index].set(part), recorded, of_layer)

    recorded = None
    if (selected := selected_units(config, state.policy)) is not None:
        lead = (config.num_layers, tokens.shape[0], config.num_kv_heads)
        recorded = jnp.zeros((*lead, selected), jnp.int32), jnp.zeros(lead, jnp.int32)
    x = _with_padding(model.embed[...][tokens])[:, None]
    x, state, recorded = jax.lax.fori_loop(0, config.num_layers, body, (x, state, recorded))
    of_cache = residence if state.policy is None else by_policy
    state = of_cache.write_back(state, place.positions)
    state = dataclasses.replace(state, lengths=state.lengths + active)
    ids, fetched = (None, None) if recorded is None else recorded
    return state, StepOutput(model.logits(model.final_norm(x[:, 0]))[:batch], ids, fetched)


def _with_padding(x: Float[Array, "B *rest"]) -> Float[Array, "rows *rest"]:
    """`x` with as many rows as matrix products of a GPU take: XLA would pad before each of them by a launch.

    One row alone is no matrix.
    """
    batch = x.shape[0]
    more = -batch % _ROWS if batch > 1 and current_device().is_gpu else 0
    return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))
