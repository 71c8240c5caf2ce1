"""InfLLM (arXiv 2402.04617; thunlp/InfLLM at 12b7079, `ContextManager` with its least-recently-used cache), one layer.

No position is absolute: keys are kept as they are before RoPE. A token is first part of the remainder, which holds the
local window; what leaves the window becomes one of the first tokens (init) or part of a block. One selection serves all
heads of a row. Prompts are read in pieces with the same sparse attention as decoding: a generated token is a piece of
one, and `read` takes both:

1. Tokens of the local window are scored with RoPE, positions counted inside the window; query and keys of all others
   as if the query stood at position n_local - 1 and every key at 0 (`local_tokens`, `global_tokens`).
2. `score` compares the mean query of the piece with the representative keys of every block, `select` takes the best.
3. One softmax over both parts. What a token of the window receives is added to its weight.
4. Selected blocks that the device does not hold must come; the least recently used make room (`keep_recent`).
5. The oldest tokens of the remainder become init tokens and blocks (`store_blocks`); a block is represented, for each
   query head, by the mean of the keys of the largest weights.

As the original does it and its paper does not say: nothing masks the part that is not local, so that in a piece of a
prompt every query sees all tokens that leave the window of the piece's last query, and those near its own twice, once
in each part. In decoding the parts are disjoint. Unlike the original: rows of their own lengths, and weights are
float32 (there of the model's dtype).

Shapes: B rows, Q tokens of a piece, S room for tokens, M for blocks, K KV heads, N query heads, D head dim, W tokens of
the window, A of a list.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.baselines import common
from nosa_jax.policy import Policy
from nosa_jax.rope import Rotations
from pallas_kernels.checks import bad_value, require_size


@dataclasses.dataclass(frozen=True)
class InfLLM(Policy):
    """Which tokens InfLLM attends to (arXiv 2402.04617); the defaults are those of the NOSA paper's comparison.

    block: tokens per block. n_init: first tokens, always attended to. n_local: last tokens, always attended to.
    topk: selected blocks. max_cached: blocks on the device, at least topk.
    exc: tokens of a prompt that are read at once and select together, at most n_local.
    rep: tokens whose mean key represents a block.

    Raises TypeError or ValueError where a value makes no sense.
    """

    refusal: ClassVar[str | None] = "its prefill and positions share nothing with this engine"

    block: int = 128
    n_init: int = 128
    n_local: int = 1024
    topk: int = 32
    max_cached: int = 32
    exc: int = 512
    rep: int = 4

    def __post_init__(self) -> None:
        least = {"block": 1, "n_init": 0, "n_local": 1, "topk": 1, "max_cached": 1, "exc": 1, "rep": 1}
        for name, minimum in least.items():
            object.__setattr__(self, name, require_size(f"InfLLM.{name}", getattr(self, name), minimum))
        for name, limit, rule in (("exc", "n_local", "at most"), ("rep", "block", "at most")):
            most = getattr(self, limit)
            if getattr(self, name) > most:
                rule = f"must be at most {limit} = {most}"
                raise bad_value(f"InfLLM.{name}", rule, getattr(self, name), f"Use {name}={most} or less.")
        if self.max_cached < self.topk:
            rule = f"must hold one selection, topk = {self.topk}"
            raise bad_value("InfLLM.max_cached", rule, self.max_cached, f"Use max_cached={self.topk} or more.")


@pytree_dataclass
class InfLLMState:
    """What one layer remembers of its rows.

    lengths [B]: tokens so far. num_init, num_blocks [B]: init tokens and blocks among them.
    keys (before RoPE), values [B, K, S, D]: every token; in an engine the blocks are in host memory.
    weights float32 [B, N, S]: attention that each token received while it was in the local window.
    representatives [B, N, M, D]: of every block, 0 for blocks that are not there yet.
    pieces [B]: read so far. last_used [B, M]: the piece that selected a block last, counted from 1; 0 where it is not
    on the device. entered [B, M]: ascends in the order in which the blocks on the device came.
    """

    lengths: Any
    num_init: Any
    num_blocks: Any
    keys: Any
    values: Any
    weights: Any
    representatives: Any
    pieces: Any
    last_used: Any
    entered: Any


@pytree_dataclass
class InfLLMStep:
    """What a piece did: ids [B, topk] of the selected blocks, by score where there was a choice, else ascending;
    new_ids [B, topk] those of them that came over the link, ascending; -1 behind. scores [B, M], 0 where there is no
    block. attended [B, A]: positions of the local part, of selected blocks in ascending order, of init tokens, of the
    remainder, -1 where nothing is. out [B, N, Q, D]; 0 behind a row's tokens."""

    ids: Any
    new_ids: Any
    scores: Any
    attended: Any
    out: Any


def empty(policy: InfLLM, like: Float[Array, "B K Q D"], heads: int, room: int) -> InfLLMState:
    """A state without tokens, with room for `room` of them; shapes and dtype of keys and values are those of `like`."""
    batch, kv_heads, _, dim = like.shape
    blocks = max(room // policy.block, policy.topk)
    none = jnp.zeros((batch,), jnp.int32)
    store = jnp.zeros((batch, kv_heads, room, dim), like.dtype)
    representatives = jnp.zeros((batch, heads, blocks, dim), like.dtype)
    stamps = jnp.zeros((batch, blocks), jnp.int32)
    weights = jnp.zeros((batch, heads, room), jnp.float32)
    return InfLLMState(none, none, none, store, store, weights, representatives, none, stamps, stamps)


def local_tokens(
    policy: InfLLM, start: Int32[Array, " B"], count: Int32[Array, " B"], width: int
) -> tuple[Int32[Array, "B W"], Int32[Array, " B"], Bool[Array, "B Q W"]]:
    """The local window of a piece of up to `width` tokens: (positions, where it begins, which queries see which).

    A query sees itself and the n_local - 1 tokens before it.
    """
    first = jnp.maximum(start - policy.n_local, 0)
    positions = first[:, None] + jnp.arange(policy.n_local + width, dtype=jnp.int32)
    positions = jnp.where(positions < (start + count)[:, None], positions, -1)
    own = start[:, None] + jnp.arange(width, dtype=jnp.int32)
    distance = own[:, :, None] - positions[:, None]
    near = (distance >= 0) & (distance < policy.n_local)
    return positions, first, near & (positions >= 0)[:, None] & (jnp.arange(width) < count[:, None])[:, :, None]


def global_tokens(
    policy: InfLLM, state: InfLLMState, ids: Int32[Array, "B topk"], end: Int32[Array, " B"], width: int
) -> Int32[Array, "B A"]:
    """Positions of what all queries of a piece see beside their windows: blocks `ids`, init, and the remainder's start.

    end: tokens of the row with the piece. The remainder's tokens are those that leave the window of its last query.
    """
    blocks = common.unit_tokens(ids, policy.block, first=policy.n_init)
    init = jnp.broadcast_to(jnp.arange(policy.n_init, dtype=jnp.int32), (len(end), policy.n_init))
    rest = _remainder(policy, state)[:, None] + jnp.arange(policy.block - 1 + width, dtype=jnp.int32)
    init = jnp.where(init < state.num_init[:, None], init, -1)
    rest = jnp.where(rest < (end - policy.n_local)[:, None], rest, -1)
    return jnp.concatenate([blocks, init, rest], axis=1)


def _remainder(policy: InfLLM, state: InfLLMState) -> Int32[Array, " B"]:
    """The first position that is neither init nor in a block."""
    return state.num_init + state.num_blocks * policy.block


def score(state: InfLLMState, q_global: Float[Array, "B N Q D"], count: Int32[Array, " B"]) -> Float[Array, "B M"]:
    """float32: the piece's mean query times the block's representative, summed over all heads; no scale, no softmax."""
    real = (jnp.arange(q_global.shape[2]) < count[:, None])[:, None, :, None]
    mean = jnp.where(real, q_global, 0).astype(jnp.float32).sum(2) / jnp.maximum(count, 1)[:, None, None]
    return jnp.einsum("bnd,bnmd->bm", mean, state.representatives.astype(jnp.float32), precision="highest")


def select(policy: InfLLM, scores: Float[Array, "B M"], num_blocks: Int32[Array, " B"]) -> Int32[Array, "B topk"]:
    """The best blocks by score, ties to the lower one; all of them, ascending, where there are no more than topk."""
    places = jnp.arange(scores.shape[1])
    few = (num_blocks <= policy.topk)[:, None]
    return common.best(jnp.where(few, -places.astype(jnp.float32), scores), places < num_blocks[:, None], policy.topk)


def keep_recent(
    policy: InfLLM, state: InfLLMState, ids: Int32[Array, "B topk"], real: Bool[Array, " B"]
) -> tuple[InfLLMState, Int32[Array, "B topk"]]:
    """Brings the selected blocks to the device: (the state after it, ids that were missing, ascending).

    The least recently used leave, never one of the selected; of equals the one that came first, and of those that came
    together the one that had the higher score. real: rows that have a piece at all.
    """
    blocks = state.last_used.shape[1]
    pieces = state.pieces + real
    places = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), state.last_used.shape)
    cached, wanted = state.last_used > 0, common.among(places, ids)
    missing = wanted & ~cached
    surplus = cached.sum(1) + missing.sum(1) - policy.max_cached
    may_leave = cached & ~wanted
    order = jnp.lexsort((state.entered, state.last_used, ~may_leave), axis=-1)
    leaves = may_leave & (jnp.argsort(order, axis=-1) < surplus[:, None])
    rank = jnp.arange(policy.topk, dtype=jnp.int32)[None]
    where = jnp.where(ids < 0, blocks, ids)
    ranks = jnp.zeros_like(places).at[common.rows_of(ids)[:, None], where].set(rank, mode="drop")
    entered = jnp.where(missing, pieces[:, None] * policy.topk + ranks, state.entered)
    last_used = jnp.where(wanted, pieces[:, None], jnp.where(leaves, 0, state.last_used))
    new_ids = common.compact(places, missing)[:, : policy.topk]
    return dataclasses.replace(state, pieces=pieces, last_used=last_used, entered=entered), new_ids


def store_blocks(policy: InfLLM, state: InfLLMState, width: int) -> InfLLMState:
    """Moves what has left the local window to init tokens, then to blocks, after a piece of up to `width` tokens."""
    rest = state.lengths - _remainder(policy, state)
    moved = jnp.clip(rest - policy.n_local, 0, policy.n_init - state.num_init)
    state = dataclasses.replace(state, num_init=state.num_init + moved)
    new = jnp.maximum(rest - moved - policy.n_local, 0) // policy.block  # 0 until init is full: nothing is left then

    batch, heads, blocks, dim = state.representatives.shape
    most = (policy.block - 1 + width) // policy.block
    tokens = _remainder(policy, state)[:, None] + jnp.arange(most * policy.block, dtype=jnp.int32)
    inside = jnp.clip(tokens, 0, state.weights.shape[2] - 1)[:, None]
    weights = jnp.take_along_axis(state.weights, inside, axis=2).reshape(batch, heads, most, policy.block)
    offsets = common.best(weights, jnp.ones_like(weights, bool), policy.rep)
    chosen = tokens.reshape(batch, 1, most, policy.block)[..., :1] + offsets
    chosen = chosen.reshape(batch, state.keys.shape[1], -1)  # the query heads of a KV head read the same keys
    keys = common.take_tokens(state.keys, chosen).astype(jnp.float32)
    means = keys.reshape(batch, heads, most, policy.rep, dim).mean(3).astype(state.keys.dtype)
    number = jnp.arange(most, dtype=jnp.int32)
    places = jnp.where(number < new[:, None], state.num_blocks[:, None] + number, blocks)
    where = (common.rows_of(places)[:, None], slice(None), places)
    representatives = state.representatives.at[where].set(jnp.moveaxis(means, 1, 2), mode="drop")
    return dataclasses.replace(state, num_blocks=state.num_blocks + new, representatives=representatives)


def read(
    policy: InfLLM,
    state: InfLLMState,
    rotations: Rotations,
    q: Float[Array, "B N Q D"],
    k: Float[Array, "B K Q D"],
    v: Float[Array, "B K Q D"],
    count: Int32[Array, " B"],
) -> tuple[InfLLMState, InfLLMStep]:
    """A piece of up to `exc` tokens of a prompt, or one generated token, per row.

    q, k: before RoPE. count: real tokens of the piece, the first ones; a row with 0 stays as it is. rotations: of
    positions 0 .. n_local + Q at least.
    """
    start, width = state.lengths, q.shape[2]
    own = start[:, None] + jnp.arange(width, dtype=jnp.int32)
    real = jnp.arange(width) < count[:, None]
    put = lambda store, new: _put_tokens(store, new, jnp.where(real, own, -1))
    state = dataclasses.replace(state, keys=put(state.keys, k), values=put(state.values, v), lengths=start + count)

    q_global = rotations.turn(q, jnp.full((1, 1, 1), policy.n_local - 1, jnp.int32))
    scores = score(state, q_global, count)
    ids = jnp.where((count > 0)[:, None], select(policy, scores, state.num_blocks), -1)
    state, new_ids = keep_recent(policy, state, ids, count > 0)

    near, first, seen = local_tokens(policy, start, count, width)
    far = global_tokens(policy, state, common.ascending(ids), state.lengths, width)
    near_keys = rotations.turn(common.take_tokens(state.keys, near[:, None]), (near - first[:, None])[:, None])
    near_logits = _head_logits(rotations.turn(q, (own - first[:, None])[:, None]), near_keys)
    far_logits = _head_logits(q_global, common.take_tokens(state.keys, far[:, None]))
    attended = jnp.concatenate([near, far], axis=1)
    reach = jnp.broadcast_to((far >= 0)[:, None] & real[:, :, None], (*real.shape, far.shape[1]))
    mask = jnp.concatenate([seen, reach], axis=2)
    weights = common.softmax(jnp.concatenate([near_logits, far_logits], axis=3), mask[:, None])
    values = jnp.where((attended >= 0)[:, None, :, None], common.take_tokens(state.values, attended[:, None]), 0)
    out = _weighted_sum(weights, values).astype(q.dtype)

    given = jnp.moveaxis(weights[..., : near.shape[1]].sum(2), 1, 2)
    where = (common.rows_of(near)[:, None], slice(None), jnp.where(near < 0, state.weights.shape[2], near))
    state = dataclasses.replace(state, weights=state.weights.at[where].add(given, mode="drop"))
    # In decoding a window has one token more than its query sees.
    shown = jnp.where(mask.any(1), attended, -1)
    return store_blocks(policy, state, width), InfLLMStep(ids, new_ids, scores, shown, out)


def _put_tokens(
    store: Float[Array, "B K S D"], tokens: Float[Array, "B K Q D"], positions: Int32[Array, "B Q"]
) -> Float[Array, "B K S D"]:
    """The store with tokens written at their positions; those of a position outside of it are dropped."""
    places = jnp.where(positions < 0, store.shape[2], positions)
    tokens = jnp.moveaxis(tokens, 1, 2).astype(store.dtype)
    return store.at[common.rows_of(store)[:, None], :, places].set(tokens, mode="drop")


def _head_logits(q: Float[Array, "B N Q D"], keys: Float[Array, "B K A D"]) -> Float[Array, "B N Q A"]:
    """q . k / sqrt(D), each query head with the keys of its KV head."""
    batch, heads, queries, dim = q.shape
    q = q.reshape(batch, keys.shape[1], -1, queries, dim).astype(jnp.float32)
    logits = jnp.einsum("bkgqd,bkad->bkgqa", q, keys.astype(jnp.float32), precision="highest")
    return logits.reshape(batch, heads, queries, -1) / jnp.sqrt(jnp.float32(dim))


def _weighted_sum(weights: Float[Array, "B N Q A"], values: Float[Array, "B K A D"]) -> Float[Array, "B N Q D"]:
    """float32; each query head reads the values of its KV head, which must be finite."""
    batch, heads, queries, tokens = weights.shape
    weights = weights.reshape(batch, values.shape[1], -1, queries, tokens)
    out = jnp.einsum("bkgqa,bkad->bkgqd", weights, values.astype(jnp.float32), precision="highest")
    return out.reshape(batch, heads, queries, -1)
