"""Running a batch with a KV cache: prefill, extend and decode, as pure functions from state to state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax import rope
from nosa_jax._pytree import pytree_dataclass
from nosa_jax.attention import layout
from nosa_jax.attention.importance import Importance
from nosa_jax.attention.layer import Attention
from nosa_jax.attention.selection import select
from nosa_jax.cache import layer_cache as kv
from nosa_jax.cache.plan import plan
from nosa_jax.cache.state import DecodeState, empty_state, require_fitting
from nosa_jax.config import CacheConfig, ModelConfig
from nosa_jax.model import Layers, NosaLM, layer_at, rms_norm
from pallas_kernels import block_attention, blocks
from pallas_kernels.checks import bad_value, is_concrete, require_type

# For whoever jits `decode_step`: without it XLA copies every layer's weights at every step on a GPU, since its own
# matrix products cannot read a slice of the stack where it lies. `generate` and `stream` pass it themselves.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def program[**P, R](**options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: `jax.jit` with COMPILER_OPTIONS, or without them where the caller is being traced itself."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        inner = jax.jit(function, **options)
        outer = jax.jit(function, compiler_options=COMPILER_OPTIONS, **options)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            is_traced = isinstance(jnp.zeros(()), jax.core.Tracer)
            return (inner if is_traced else outer)(*args, **kwargs)

        return call

    return decorate


@pytree_dataclass
class StepOutput:
    """logits [B, V] float32 after the last token; block_ids [L, B, K, J] its selection (None for `full`); fetched
    [L, B, K] blocks that crossed from the host for it (None for `full`)."""

    logits: Any
    block_ids: Any
    fetched: Any


def prefill(
    model: NosaLM,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    max_length: int,
    cache: CacheConfig = CacheConfig(),
    chunk: int | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads the prompts into a new state. Returns it with the float32 logits after each prompt's last token.

    tokens: int [B, T], right-padded where `lengths` [B] says so. max_length: what a row may grow to, prompt included.
    chunk: tokens read at once; None reads all, a number bounds the memory of activations.
    Raises ValueError for bad input and CacheTooLargeError, before anything is allocated, when the cache does not fit.
    """
    tokens, lengths = check_prompt(model, tokens, lengths, max_length, cache)
    check_chunk(chunk)
    state, out = _prefill(model, tokens, lengths, max_length=max_length, cache=cache, chunk=chunk)
    return state, out.logits


def extend(
    model: NosaLM, state: DecodeState, tokens: ArrayLike, lengths: ArrayLike | None = None
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads any number of further tokens into a running state: the next turn, or the next chunk of a prompt.

    tokens: int [B, n]; row b gets the first `lengths[b]` of them, 0 leaves it as it is. Returns the new state and the
    logits after each row's last token (meaningless where a row got none). The old state stays valid; to reuse its
    memory, jit this function with the state donated. Under jit, where values cannot be checked, tokens beyond
    `max_length` are dropped. Each layer's cache is staged on the device as a whole, [B, K, M, 2, P, D], one at a time.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    tokens = layout.as_tokens(tokens, model.config.vocab_size)
    batch, width = tokens.shape
    check_state(model, state, batch)
    lengths = layout.as_lengths(lengths, batch, width, minimum=0)
    count = jnp.full((batch,), width, jnp.int32) if lengths is None else lengths
    check_room(state, count)
    state, out = _extend(model, state, tokens, count)
    return state, out.logits


def decode_step(model: NosaLM, state: DecodeState, tokens: ArrayLike) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Feeds one token to every row. Returns the new state and the float32 logits of what follows.

    A plain function: jit it with the state donated for a loop of your own,
    `jax.jit(decode_step, donate_argnums=1, compiler_options=nosa_jax.COMPILER_OPTIONS)`; a donated state is gone, go on
    with the new one. Under jit, where values cannot be checked, a row that is already
    `max_length` long stays as it is and its logits mean nothing: watch `state.lengths`.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    tokens = layout.as_tokens(tokens, model.config.vocab_size, rank=1)
    check_state(model, state, tokens.shape[0])
    check_room(state, 1)
    state, out = step(model, state, tokens)
    return state, out.logits


def check_prompt(
    model: NosaLM, tokens: Any, lengths: Any, max_length: int, cache: CacheConfig, devices: int = 1
) -> tuple[Array, Array]:
    """Checked tokens [B, T] and lengths [B] of a prompt that fits into a cache that fits into memory.

    devices: how many share the rows.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    require_type("cache", cache, CacheConfig, "Pass CacheConfig(...).")
    tokens = layout.as_tokens(tokens, model.config.vocab_size)
    batch, width = tokens.shape
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < width:
        raise bad_value(
            "max_length", f"must be an int >= tokens.shape[1] = {width}", max_length, "Leave room for new tokens too."
        )
    lengths = layout.as_lengths(lengths, batch, width)
    if lengths is None:
        lengths = jnp.full((batch,), width, jnp.int32)
    one_device = plan(model.config, batch // devices, max_length, cache, dtype=model.embed.dtype)
    one_device.require_memory(allocated=("weights",), devices=devices)
    return tokens, lengths


def check_state(model: NosaLM, state: DecodeState, batch: int) -> None:
    """Raises ValueError unless `model` could have made the state, of `batch` rows."""
    require_type("state", state, DecodeState, "Take the one that prefill returns.")
    rows = state.lengths.shape[0]
    if batch != rows:
        raise bad_value("tokens", f"must have the state's {rows} rows", batch, "Pass one row of tokens per row of it.")
    require_fitting(state, model.config, model.embed.dtype)


def check_chunk(chunk: Any) -> None:
    """Raises ValueError unless it is a whole number above 0, or None."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise bad_value("chunk", "must be an int >= 1 or None", repr(chunk), "512 is a good start.")


def check_room(state: DecodeState, count: Any) -> None:
    """Raises ValueError when `count` more tokens would pass `max_length`, where values can be seen."""
    if not is_concrete(state.lengths, count):
        return
    totals = jax.device_get(state.lengths) + jax.device_get(count)
    row = int(np.argmax(totals))
    if totals[row] > state.max_length:
        raise bad_value(
            "tokens",
            f"rows may not grow beyond the state's max_length = {state.max_length}",
            f"{totals[row]} for row {row}",
            "Prefill with a larger max_length.",
        )


@program(static_argnames=("max_length", "cache", "chunk"))
def _prefill(
    model: NosaLM,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    forced_ids: Int32[Array, "L B K J"] | None = None,
    *,
    max_length: int,
    cache: CacheConfig,
    chunk: int | None,
) -> tuple[DecodeState, StepOutput]:
    batch, width = tokens.shape
    state = empty_state(model.config, batch, max_length, cache, model.embed.dtype)
    if chunk is None or chunk >= width:
        return _extend(model, state, tokens, lengths, forced_ids, fresh=True)
    chunks = -(-width // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - width)))
    tokens = jnp.moveaxis(tokens.reshape(batch, chunks, chunk), 1, 0)
    ends = chunk * jnp.arange(1, chunks + 1, dtype=jnp.int32)

    def body(carry: tuple[DecodeState, StepOutput], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        state, kept = carry
        tokens, end = inputs
        count = jnp.clip(lengths - (end - chunk), 0, chunk)
        ids = None
        if forced_ids is not None:  # only the chunk with a row's last token may use them
            ids = jnp.where(((lengths > end - chunk) & (lengths <= end))[None, :, None, None], forced_ids, -2)
        state, out = _extend(model, state, tokens, count, ids)
        grew = count > 0
        return (state, jax.tree.map(lambda new, old: _where_rows(grew, new, old), out, kept)), None

    shapes = jax.eval_shape(_extend, model, state, tokens[0], lengths, None)[1]
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (state, out), _ = jax.lax.scan(body, (state, kept), (tokens, ends))
    return state, out


def _where_rows(condition: Bool[Array, " B"], new: Array, old: Array) -> Array:
    """Per row; logits have it first, what is stacked over layers has it second."""
    axis = 0 if new.ndim == 2 else 1
    return jnp.where(jnp.expand_dims(condition, tuple(i for i in range(new.ndim) if i != axis)), new, old)


@functools.partial(jax.jit, static_argnames="fresh")
def _extend(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    forced_ids: Int32[Array, "L B K J"] | None = None,
    *,
    fresh: bool = False,
) -> tuple[DecodeState, StepOutput]:
    """forced_ids replace the selection of each row's last token; a row of -2 replaces nothing."""
    config = model.config
    n = tokens.shape[1]
    count = jnp.clip(count, 0, jnp.minimum(n, state.max_length - state.lengths))
    place = state.lengths[:, None] + jnp.arange(n, dtype=jnp.int32)
    positions = jnp.where(jnp.arange(n) < count[:, None], place, -1)
    last = jnp.maximum(count - 1, 0)

    def body(carry: tuple[Array, DecodeState], inputs: tuple[Layers, Array, Array | None]) -> tuple[Any, Any]:
        x, state = carry
        layer, index, forced = inputs
        normed = rms_norm(x, layer.attention_norm[...], config.rms_norm_eps)
        out, state, ids = _extend_layer(config, layer.attention, state, normed, place, positions, forced, index, fresh)
        return (layer.feed_forward(config, x + out), state), ids

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x, state), ids = jax.lax.scan(body, (model.embed[...][tokens], state), (model.layers, indices, forced_ids))
    hidden = model.final_norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
    fetched = None if ids is None else jnp.zeros(ids.shape[:3], jnp.int32)
    state = dataclasses.replace(state, lengths=state.lengths + count)
    return state, StepOutput(model.logits(hidden), ids, fetched)


def _extend_layer(
    config: ModelConfig,
    attention: Attention,
    state: DecodeState,
    x: Float[Array, "B n H"],
    place: Int32[Array, "B n"],
    positions: Int32[Array, "B n"],
    forced: Int32[Array, "B K J"] | None,
    layer: Int32[Array, ""],
    fresh: bool,
) -> tuple[Float[Array, "B n H"], DecodeState, Int32[Array, "B K J"] | None]:
    """Attention of many new tokens over a staged copy of the layer's cache; the last query's ids are returned."""
    q, k, v, importance = attention.project(config, x, *rope.of_positions(config, place))
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    state = kv.summarize(config.attention, state, k, importance, count, layer)
    staged = kv.write_staged(state, kv.stage_layer(state, layer, fresh=fresh), k, v, count)
    ids = last_ids = None
    if config.attention.is_sparse:
        ids = _select(config, state, q, positions, layer)
        last = jnp.maximum(count - 1, 0)[:, None, None, None]
        if forced is not None:
            is_last = (jnp.arange(x.shape[1]) == count[:, None] - 1)[:, None, :, None]
            ids = jnp.where(is_last & (forced[:, :, None, :1] > -2), forced[:, :, None], ids)
        last_ids = jnp.take_along_axis(ids, last, axis=2)[:, :, 0]
    flat = (*staged.shape[:2], -1)
    keys, values = (staged[:, :, :, i].reshape(*flat, staged.shape[-1]) for i in (0, 1))
    bias = None if state.importance is None else state.importance[layer].reshape(flat)
    out, _ = block_attention(q, keys, values, bias, ids, positions, block_size=config.attention.block_size)
    state = kv.unstage_layer(state, staged, last_ids, count, x.shape[1], layer, fresh=fresh)
    return attention.merge(out), state, last_ids


def _select(
    config: ModelConfig,
    state: DecodeState,
    q: Float[Array, "B n N D"],
    positions: Int32[Array, "B n"],
    layer: Int32[Array, ""],
) -> Int32[Array, "B K n J"]:
    pooled_importance = None if state.pooled_importance is None else state.pooled_importance.pooled[layer, ..., 0]
    pooled_keys = None if state.keys is None else state.keys.pooled
    of_layer: Array | None = layer
    if pooled_keys is not None and q.shape[1] > 1:  # one query alone is not worth a copy of the layer
        pooled_keys, of_layer = pooled_keys[layer], None
    return select(
        config.attention,
        q,
        pooled_keys,
        pooled_importance,
        positions,
        num_blocks=state.num_blocks,
        layer=of_layer,
    )


class Shared(NamedTuple):
    """What the layers of a step have in common: positions of the new tokens, -1 where a row has none; cos and sin of
    the positions."""

    positions: Int32[Array, " B"]
    cos_sin: tuple[Float[Array, "B half"], Float[Array, "B half"]]


def _shared(config: ModelConfig, positions: Int32[Array, " B"]) -> Shared:
    cos, sin = rope.of_positions(config, jnp.maximum(positions, 0)[:, None])
    return Shared(positions, (cos[:, 0], sin[:, 0]))


@jax.jit
def step(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, " B"],
    active: Bool[Array, " B"] | None = None,
    forced_ids: Int32[Array, "L B K J"] | None = None,
) -> tuple[DecodeState, StepOutput]:
    """One token for every active row; the others stay as they are. forced_ids replace the selection; a row of -2
    replaces nothing."""
    config = model.config
    room = state.lengths < state.max_length
    active = room if active is None else room & active
    shared = _shared(config, jnp.where(active, state.lengths, -1))

    importance = model.layers.attention.importance if config.attention.uses_importance else None

    def body(index: Array, carry: tuple[Array, DecodeState, Any]) -> tuple[Array, DecodeState, Any]:
        x, state, recorded = carry
        forced = None if forced_ids is None else forced_ids[index]
        attention, x = layer_at(model.layers.attention, index, x)
        normed = rms_norm(x, model.layers.attention_norm[...][index], config.rms_norm_eps)
        out, state, of_layer = _step_layer(config, attention, importance, state, normed, shared, forced, index)
        mlp, x = layer_at(model.layers.mlp, index, x + out)
        x = x + mlp(rms_norm(x, model.layers.mlp_norm[...][index], config.rms_norm_eps))
        return x, state, jax.tree.map(lambda whole, part: whole.at[index].set(part), recorded, of_layer)

    recorded = None
    if config.attention.is_sparse:
        lead = (config.num_layers, tokens.shape[0], config.num_kv_heads)
        recorded = jnp.zeros((*lead, config.attention.num_selected_blocks), jnp.int32), jnp.zeros(lead, jnp.int32)
    x = model.embed[...][tokens][:, None]
    x, state, recorded = jax.lax.fori_loop(0, config.num_layers, body, (x, state, recorded))
    state = kv.write_back(state, shared.positions)
    state = dataclasses.replace(state, lengths=state.lengths + active)
    ids, fetched = (None, None) if recorded is None else recorded
    return state, StepOutput(model.logits(model.final_norm(x[:, 0])), ids, fetched)


def _step_layer(
    config: ModelConfig,
    attention: Attention,
    importance: Importance | None,
    state: DecodeState,
    x: Float[Array, "B 1 H"],
    shared: Shared,
    forced: Int32[Array, "B K J"] | None,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B 1 H"], DecodeState, tuple[Int32[Array, "B K J"], Int32[Array, "B K"]] | None]:
    """Attention of one new token per row: select, make resident, write the token, attend."""
    positions = shared.positions
    qkv = attention.heads(config, x[:, 0])
    state, q, k, v = kv.read_token(config, state, qkv, shared.cos_sin, importance, positions, layer)
    if config.attention.is_sparse:
        ids = _select(config, state, q[:, None], positions[:, None], layer)[:, :, 0]
        if forced is not None:
            ids = jnp.where((forced[:, :, :1] > -2) & (positions >= 0)[:, None, None], forced, ids)
    else:
        own = blocks.query_blocks(positions, config.attention.block_size)
        every = jnp.arange(state.num_blocks, dtype=jnp.int32)
        every = jnp.where(every <= own[:, None], every, -1)[:, None]
        ids = jnp.broadcast_to(every, (x.shape[0], config.num_kv_heads, state.num_blocks))
    state, residence = kv.admit(state, ids, positions, layer)
    state, out = kv.attend(state, q, k, v, residence, positions, layer)
    recorded = None
    if config.attention.is_sparse:
        loads = residence.loads
        recorded = ids, jnp.zeros(ids.shape[:2], jnp.int32) if loads is None else jnp.sum(loads >= 0, -1, jnp.int32)
    return attention.merge(out[:, None]), state, recorded
