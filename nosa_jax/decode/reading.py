"""Many new tokens into a cache: in groups of rows, in chunks of tokens, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax import rope
from nosa_jax.attention.dense import dense_attention_in_cache
from nosa_jax.attention.layer import Attention
from nosa_jax.cache import by_policy, staging, summaries
from nosa_jax.cache.state import DecodeState, rows_of, with_rows
from nosa_jax.cache.working_set import MLP_TOKENS, Reading
from nosa_jax.config import ModelConfig
from nosa_jax.decode.step import StepOutput, run_step
from nosa_jax.model import Layers, NosaLM
from pallas_kernels import block_attention, blocks
from pallas_kernels.promotion import usual_promotion


def read_groups(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    forced_block_ids: Int32[Array, "L B K J"] | None,
    reading: Reading,
    *,
    fresh: bool,
    dense: bool = False,
) -> tuple[DecodeState, StepOutput]:
    """Reads the first `count[b]` tokens of each row, group after group.

    forced_block_ids: replace the selection of each row's last token, see `blocks.replace_selection`.
    fresh: the rows were empty before.
    dense: the new tokens attend to all before them, without a bias, whatever the variant.
    Logits of a row are NaN where it had no room for its tokens, or one of them is out of the vocabulary.
    """
    room = state.limits - state.lengths
    known = (tokens >= 0) & (tokens < model.config.vocab_size) | (jnp.arange(tokens.shape[1]) >= count[:, None])
    usable = (count <= room) & known.all(1)
    count = jnp.clip(count, 0, jnp.minimum(tokens.shape[1], room))
    read = functools.partial(_read_chunks, model, chunk=reading.chunk, fresh=fresh, dense=dense)
    if reading.rows < tokens.shape[0]:
        read = functools.partial(_in_groups, read, reading.rows)
    state, out = read(state, tokens, count, forced_block_ids)
    return state, dataclasses.replace(out, logits=jnp.where(usable[:, None], out.logits, jnp.nan))


def _in_groups(
    read: Callable[..., tuple[DecodeState, StepOutput]],
    rows: int,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    forced_block_ids: Int32[Array, "L B K J"] | None,
) -> tuple[DecodeState, StepOutput]:
    """`read` of so many rows at a time."""
    batch = tokens.shape[0]
    shapes = jax.eval_shape(lambda *args: read(*args)[1], state, tokens, count, forced_block_ids)
    whole = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(group: Array, carry: tuple[DecodeState, StepOutput]) -> tuple[DecodeState, StepOutput]:
        state, whole = carry
        begin = group.astype(jnp.int32) * rows
        first = jnp.minimum(begin, batch - rows)  # the last group may begin with rows that are done
        cut = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, first, rows, axis)
        is_new = first + jnp.arange(rows, dtype=jnp.int32) >= begin
        forced = None if forced_block_ids is None else cut(forced_block_ids, 1)
        part, out = read(rows_of(state, first, rows), cut(tokens), jnp.where(is_new, cut(count), 0), forced)

        def put(x: Array, new: Array) -> Array:
            axis = _row_axis(x)
            new = _where_rows(is_new, new, cut(x, axis))
            return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis)

        return with_rows(state, part, first), jax.tree.map(put, whole, out)

    groups = -(-batch // rows)
    return jax.lax.fori_loop(0, groups, body, (state, whole))


def _read_chunks(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    forced_block_ids: Int32[Array, "L B K J"] | None,
    *,
    chunk: int | None,
    fresh: bool,
    dense: bool,
) -> tuple[DecodeState, StepOutput]:
    """`read_groups` of one group, `chunk` tokens at a time."""
    batch, width = tokens.shape
    if chunk is None or chunk >= width:
        return _read(model, state, tokens, count, forced_block_ids, fresh=fresh, dense=dense)
    chunks = -(-width // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - width)))
    tokens = jnp.moveaxis(tokens.reshape(batch, chunks, chunk), 1, 0)
    ends = chunk * jnp.arange(1, chunks + 1, dtype=jnp.int32)

    def body(carry: tuple[DecodeState, StepOutput], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        state, kept = carry
        tokens, end = inputs
        in_chunk = jnp.clip(count - (end - chunk), 0, chunk)
        forced = forced_block_ids
        if forced is not None:  # only the chunk with a row's last token may use them
            is_last = (count > end - chunk) & (count <= end)
            forced = jnp.where(is_last[None, :, None, None], forced, -1)
        state, out = _read(model, state, tokens, in_chunk, forced, dense=dense)
        return (state, jax.tree.map(functools.partial(_where_rows, in_chunk > 0), out, kept)), None

    shapes = jax.eval_shape(_read, model, state, tokens[0], count, None)[1]
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (state, out), _ = jax.lax.scan(body, (state, kept), (tokens, ends))
    return state, out


def _row_axis(x: Array) -> int:
    """Logits have rows first, what is stacked over layers has them second."""
    return 0 if x.ndim == 2 else 1


def _where_rows(condition: Bool[Array, " B"], new: Array, old: Array) -> Array:
    axis = _row_axis(new)
    return jnp.where(jnp.expand_dims(condition, tuple(i for i in range(new.ndim) if i != axis)), new, old)


@functools.partial(jax.jit, static_argnames=("fresh", "dense"))
@usual_promotion
def _read(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    forced_block_ids: Int32[Array, "L B K J"] | None = None,
    *,
    fresh: bool = False,
    dense: bool = False,
) -> tuple[DecodeState, StepOutput]:
    """`read_groups` of tokens that are read at once."""
    config = model.config
    n = tokens.shape[1]
    place = state.lengths[:, None] + jnp.arange(n, dtype=jnp.int32)
    positions = jnp.where(jnp.arange(n) < count[:, None], place, -1)

    # A layer's blocks cross the link while the layer before it computes, where there is something to stage.
    is_ahead = state.host is not None and not fresh

    def stage(state: DecodeState, layer: Array) -> Array | None:
        if state.policy is not None:  # its prompts are all there is
            return None
        some = jnp.where(layer < config.num_layers, count, 0)  # nothing crosses after the last layer
        return staging.stage(state, some, n, layer, fresh=fresh)

    def body(carry: tuple[Any, ...], inputs: tuple[Layers, Array, Array | None]) -> tuple[Any, Any]:
        x, state, staged = carry
        layer, index, forced = inputs
        staged, following = (staged, stage(state, index + 1)) if is_ahead else (stage(state, index), None)
        attend = lambda attention, x: (
            _attend(config, attention, x, state, staged, place, positions, forced, index, fresh, dense)
            if state.policy is None
            else _attend_by_policy(config, attention, x, state, positions, index)
        )
        x, (state, last_ids) = layer.block(config, x, attend, mlp_tokens=MLP_TOKENS)
        return (x, state, following), last_ids

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    inputs = (model.layers, indices, forced_block_ids)
    carry = (model.embed[...][tokens], state, stage(state, indices[0]) if is_ahead else None)
    (x, state, _), ids = jax.lax.scan(body, carry, inputs)
    last = jnp.maximum(count - 1, 0)
    hidden = model.final_norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
    fetched = None if ids is None else jnp.zeros(ids.shape[:3], jnp.int32)
    state = dataclasses.replace(state, lengths=state.lengths + count)
    return state, StepOutput(model.logits(hidden), ids, fetched)


def _attend_by_policy(
    config: ModelConfig,
    attention: Attention,
    x: Float[Array, "B n H"],
    state: DecodeState,
    positions: Int32[Array, "B n"],
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B n H"], tuple[DecodeState, Int32[Array, "B K J"]]]:
    """Dense attention of whole prompts, and what a policy keeps of them; arguments as in `_attend`."""
    qkv = attention.heads(config, x)
    cos_sin = rope.of_positions(config, jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]))
    q = rope.rotate(qkv[..., :-2, :].reshape(*x.shape[:2], config.num_heads, config.head_dim), *cos_sin)
    k_pre, v = qkv[..., -2, :], qkv[..., -1, :]
    k_post, k_pre, v = (jnp.moveaxis(part, 2, 1) for part in (rope.rotate(k_pre, *cos_sin), k_pre, v))
    size = config.attention.block_size
    out = dense_attention_in_cache(q, (k_post, v), (k_post, v), positions, size, fresh=True)
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    q_last = jnp.take_along_axis(q, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)[:, 0]
    state, ids = by_policy.put_prompt(state, k_pre, k_post, v, q_last, count, layer)
    return attention.merge(out), (state, ids)


def read_by_steps(
    model: NosaLM, state: DecodeState, tokens: Int32[Array, "B n"], count: Int32[Array, " B"]
) -> tuple[DecodeState, StepOutput]:
    """`read_groups` of rows that have a prompt and a policy, which take further tokens as if they were generated."""
    room = state.limits - state.lengths
    known = (tokens >= 0) & (tokens < model.config.vocab_size) | (jnp.arange(tokens.shape[1]) >= count[:, None])
    usable = (count <= room) & known.all(1)

    def body(index: Array, carry: tuple[DecodeState, StepOutput]) -> tuple[DecodeState, StepOutput]:
        state, kept = carry
        active = index < count
        state, out = run_step(model, state, tokens[:, index], active)
        return state, jax.tree.map(functools.partial(_where_rows, active), out, kept)

    shapes = jax.eval_shape(run_step, model, state, tokens[:, 0])[1]
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # No step is taken that no row needs.
    steps = jnp.minimum(tokens.shape[1], count.max(initial=0)).astype(jnp.int32)
    state, out = jax.lax.fori_loop(jnp.int32(0), steps, body, (state, empty))
    return state, dataclasses.replace(out, logits=jnp.where(usable[:, None], out.logits, jnp.nan))


def _attend(
    config: ModelConfig,
    attention: Attention,
    x: Float[Array, "B n H"],
    state: DecodeState,
    staged: Any,
    place: Int32[Array, "B n"],
    positions: Int32[Array, "B n"],
    forced_block_ids: Int32[Array, "B K J"] | None,
    layer: Int32[Array, ""],
    fresh: bool,
    dense: bool,
) -> tuple[Float[Array, "B n H"], tuple[DecodeState, Int32[Array, "B K J"] | None]]:
    """Attention of many new tokens over a staged copy of the layer's cache.

    config: of the model.
    attention: of this layer.
    x: input of the layer's attention.
    state: of all layers, before the tokens.
    staged: [B, K, m, 2, P, D], this layer's blocks on the device, before the tokens.
    place: positions of the tokens, padding counted on.
    positions: the same, -1 for padding.
    forced_block_ids: replace the selection of each row's last token.
    layer: index into what the state stacks.
    fresh: the rows were empty before.
    dense: attend to all, without a bias, whatever is selected.

    Returns the output, and the state with the ids that each row's last query selected (None for `full`).
    """
    q, k, v, importance = attention.project(config, x, *rope.of_positions(config, place))
    count, width = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32), x.shape[1]
    state = summaries.append_tokens(config.attention, state, k, importance, count, layer)
    staged = staging.write_tokens(state, staged, k, v, count)
    num_blocks = staged.shape[2]
    ids = last_ids = None
    if config.attention.is_sparse:
        ids = summaries.select_in(config.attention, state, q, positions, layer, num_blocks)
        last = jnp.maximum(count - 1, 0)[:, None, None, None]
        if forced_block_ids is not None:
            is_last = (jnp.arange(width) == count[:, None] - 1)[:, None, :, None]
            ids = blocks.replace_selection(ids, forced_block_ids[:, :, None], is_last)
        last_ids = jnp.take_along_axis(ids, last, axis=2)[:, :, 0]
    flat = (*staged.shape[:2], -1, staged.shape[-1])
    keys, values = (staged[:, :, :, i].reshape(flat) for i in (0, 1))
    bias, size = summaries.bias_of(state, layer, num_blocks), config.attention.block_size
    if ids is None or dense:
        out = dense_attention_in_cache(q, (k, v), (keys, values), positions, size, fresh=fresh)
    else:
        out, _ = block_attention(q, keys, values, bias, ids, positions, block_size=size)
    state = staging.unstage(state, staged, last_ids, count, width, layer)
    return attention.merge(out), (state, last_ids)
