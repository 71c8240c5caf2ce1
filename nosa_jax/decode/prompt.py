"""Reading many tokens at once into a cache: prefill of new rows, extension of running ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax import parallel, rope
from nosa_jax.attention import layout
from nosa_jax.attention.dense import dense_attention_in_cache
from nosa_jax.attention.layer import Attention
from nosa_jax.attention.selection import replace_selection
from nosa_jax.cache import staging, summaries
from nosa_jax.cache.state import DecodeState, empty_state, specs
from nosa_jax.config import CacheConfig, ModelConfig
from nosa_jax.decode import checks
from nosa_jax.decode.checks import Prompt
from nosa_jax.decode.program import program
from nosa_jax.decode.step import StepOutput, output_specs
from nosa_jax.model import Layers, NosaLM
from pallas_kernels import block_attention
from pallas_kernels.checks import IntegersLike
from pallas_kernels.promotion import usual_promotion


def prefill(
    model: NosaLM,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    max_length: int,
    cache: CacheConfig = CacheConfig(),
    chunk: int | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads the prompts into a new state. Returns it with the float32 logits after each prompt's last token.

    tokens: int [B, T], right-padded where `lengths` [B] says so.
    lengths: int [B], tokens of each row; None: all T.
    max_length: what a row may grow to, prompt included.
    cache: where the KV cache lives.
    chunk: tokens read at once; None reads all, a number bounds the memory of activations.

    On a mesh every device reads its own rows with the whole model: weights that are cut along `fsdp` or `tensor` are
    gathered at every call. To decode much, place them whole first: `jax.device_put(model, NamedSharding(mesh, P()))`.

    Raises ValueError for bad input and CacheTooLargeError, before anything is allocated, when the cache does not fit.
    """
    prompt = checks.as_prompt(model, tokens, lengths)
    max_length = checks.check_cache(model, prompt, max_length, cache)
    chunk = checks.check_chunk(chunk)
    model, prompt = checks.untransformed((model, prompt))
    state, out = read_prompt(model, prompt, max_length=max_length, cache=cache, chunk=chunk)
    return state, out.logits


def extend(
    model: NosaLM, state: DecodeState, tokens: IntegersLike, lengths: IntegersLike | None = None
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads any number of further tokens into a running state: the next turn, or the next chunk of a prompt.

    tokens: int [B, n]; row b gets the first `lengths[b]` of them, 0 leaves it as it is. Returns the new state and the
    logits after each row's last token (meaningless where a row got none). The old state stays valid; to reuse its
    memory, jit this function with the state donated. Under jit, where values cannot be checked, tokens beyond
    `max_length` are dropped. Each layer's cache is staged on the device as a whole, [B, K, M, 2, P, D], one at a time.
    """
    checks.check_model(model)
    tokens = layout.as_tokens(tokens, model.config.vocab_size)
    batch, width = tokens.shape
    checks.check_state(model, state, batch)
    lengths = layout.as_lengths(lengths, batch, width, minimum=0)
    count = jnp.full((batch,), width, jnp.int32) if lengths is None else lengths
    checks.check_room(state, count)
    model, state, tokens, count = checks.untransformed((model, state, tokens, count))
    state, out = _read_more(model, state, tokens, count)
    return state, out.logits


@program()
def _read_more(
    model: NosaLM, state: DecodeState, tokens: Int32[Array, "B n"], count: Int32[Array, " B"]
) -> tuple[DecodeState, StepOutput]:
    """`extend` by checked tokens."""
    rows, of_state = PartitionSpec(parallel.ROWS), specs(state)
    return parallel.by_rows(
        parallel.mesh_of(model, state, tokens),
        _extend,
        (model, state, tokens, count),
        (PartitionSpec(), of_state, rows, rows),
        (of_state, output_specs(model.config)),
    )


@program(static_argnames=("max_length", "cache", "chunk"))
def read_prompt(
    model: NosaLM,
    prompt: Prompt,
    forced_block_ids: Int32[Array, "L B K J"] | None = None,
    *,
    max_length: int,
    cache: CacheConfig,
    chunk: int | None,
) -> tuple[DecodeState, StepOutput]:
    """`prefill` of a checked prompt.

    forced_block_ids: replace the selection of each row's last token, see `replace_selection`.
    """
    make = lambda batch: empty_state(model.config, batch, max_length, cache, model.embed.dtype)
    read = functools.partial(_read_rows, make=make, chunk=chunk)
    mesh = parallel.mesh_of(model, prompt)
    if mesh is None:
        return read(model, prompt, forced_block_ids)
    of_state = specs(jax.eval_shape(lambda: make(prompt.batch)))
    given = (PartitionSpec(), PartitionSpec(parallel.ROWS), PartitionSpec(None, parallel.ROWS))
    out = (of_state, output_specs(model.config))
    return parallel.by_rows(mesh, read, (model, prompt, forced_block_ids), given, out)


def _read_rows(
    model: NosaLM,
    prompt: Prompt,
    forced_block_ids: Int32[Array, "L B K J"] | None,
    *,
    make: Callable[[int], DecodeState],
    chunk: int | None,
) -> tuple[DecodeState, StepOutput]:
    """make: the state of so many empty rows."""
    state = make(prompt.batch)
    if chunk is None or chunk >= prompt.width:
        return _extend(model, state, prompt.tokens, prompt.lengths, forced_block_ids, fresh=True)
    chunks = -(-prompt.width // chunk)
    tokens = jnp.pad(prompt.tokens, ((0, 0), (0, chunks * chunk - prompt.width)))
    tokens = jnp.moveaxis(tokens.reshape(prompt.batch, chunks, chunk), 1, 0)
    ends = chunk * jnp.arange(1, chunks + 1, dtype=jnp.int32)

    def body(carry: tuple[DecodeState, StepOutput], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        state, kept = carry
        tokens, end = inputs
        count = jnp.clip(prompt.lengths - (end - chunk), 0, chunk)
        forced = forced_block_ids
        if forced is not None:  # only the chunk with a row's last token may use them
            is_last = (prompt.lengths > end - chunk) & (prompt.lengths <= end)
            forced = jnp.where(is_last[None, :, None, None], forced, -1)
        state, out = _extend(model, state, tokens, count, forced)
        grew = count > 0
        return (state, jax.tree.map(lambda new, old: _where_rows(grew, new, old), out, kept)), None

    shapes = jax.eval_shape(_extend, model, state, tokens[0], prompt.lengths, None)[1]
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (state, out), _ = jax.lax.scan(body, (state, kept), (tokens, ends))
    return state, out


def _where_rows(condition: Bool[Array, " B"], new: Array, old: Array) -> Array:
    """Per row; logits have it first, what is stacked over layers has it second."""
    axis = 0 if new.ndim == 2 else 1
    return jnp.where(jnp.expand_dims(condition, tuple(i for i in range(new.ndim) if i != axis)), new, old)


@functools.partial(jax.jit, static_argnames="fresh")
@usual_promotion
def _extend(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    forced_block_ids: Int32[Array, "L B K J"] | None = None,
    *,
    fresh: bool = False,
) -> tuple[DecodeState, StepOutput]:
    """`extend` by the first `count[b]` tokens of each row.

    forced_block_ids: replace the selection of each row's last token. fresh: the rows were empty before.
    """
    config = model.config
    n = tokens.shape[1]
    count = jnp.clip(count, 0, jnp.minimum(n, state.max_length - state.lengths))
    place = state.lengths[:, None] + jnp.arange(n, dtype=jnp.int32)
    positions = jnp.where(jnp.arange(n) < count[:, None], place, -1)

    def body(carry: tuple[Array, DecodeState], inputs: tuple[Layers, Array, Array | None]) -> tuple[Any, Any]:
        x, state = carry
        layer, index, forced = inputs
        attend = lambda attention, x: _attend(config, attention, x, state, place, positions, forced, index, fresh)
        x, (state, last_ids) = layer.block(config, x, attend)
        return (x, state), last_ids

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    inputs = (model.layers, indices, forced_block_ids)
    (x, state), ids = jax.lax.scan(body, (model.embed[...][tokens], state), inputs)
    last = jnp.maximum(count - 1, 0)
    hidden = model.final_norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
    fetched = None if ids is None else jnp.zeros(ids.shape[:3], jnp.int32)
    state = dataclasses.replace(state, lengths=state.lengths + count)
    return state, StepOutput(model.logits(hidden), ids, fetched)


def _attend(
    config: ModelConfig,
    attention: Attention,
    x: Float[Array, "B n H"],
    state: DecodeState,
    place: Int32[Array, "B n"],
    positions: Int32[Array, "B n"],
    forced_block_ids: Int32[Array, "B K J"] | None,
    layer: Int32[Array, ""],
    fresh: bool,
) -> tuple[Float[Array, "B n H"], tuple[DecodeState, Int32[Array, "B K J"] | None]]:
    """Attention of many new tokens over a staged copy of the layer's cache.

    config: of the model.
    attention: of this layer.
    x: input of the layer's attention.
    state: of all layers, before the tokens.
    place: positions of the tokens, padding counted on.
    positions: the same, -1 for padding.
    forced_block_ids: replace the selection of each row's last token.
    layer: index into what the state stacks.
    fresh: the rows were empty before.

    Returns the output, and the state with the ids that each row's last query selected (None for `full`).
    """
    q, k, v, importance = attention.project(config, x, *rope.of_positions(config, place))
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    state = summaries.append_tokens(config.attention, state, k, importance, count, layer)
    staged = staging.write_tokens(state, staging.stage(state, layer, fresh=fresh), k, v, count)
    ids = last_ids = None
    if config.attention.is_sparse:
        ids = summaries.select_in(config.attention, state, q, positions, layer)
        last = jnp.maximum(count - 1, 0)[:, None, None, None]
        if forced_block_ids is not None:
            is_last = (jnp.arange(x.shape[1]) == count[:, None] - 1)[:, None, :, None]
            ids = replace_selection(ids, forced_block_ids[:, :, None], is_last)
        last_ids = jnp.take_along_axis(ids, last, axis=2)[:, :, 0]
    flat = (*staged.shape[:2], -1, staged.shape[-1])
    keys, values = (staged[:, :, :, i].reshape(flat) for i in (0, 1))
    bias, size = summaries.bias_of(state, layer), config.attention.block_size
    if ids is None:
        out = dense_attention_in_cache(q, (k, v), (keys, values), positions, size, fresh=fresh)
    else:
        out, _ = block_attention(q, keys, values, bias, ids, positions, block_size=size)
    state = staging.unstage(state, staged, last_ids, count, x.shape[1], layer, fresh=fresh)
    return attention.merge(out), (state, last_ids)
