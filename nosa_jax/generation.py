"""Text generation: `generate`, one jitted loop, and `stream`, the same step token by token."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax import decode
from nosa_jax._pytree import pytree_dataclass
from nosa_jax.attention import layout
from nosa_jax.cache.state import DecodeState
from nosa_jax.config import CacheConfig
from nosa_jax.model import NosaLM, as_block_ids
from nosa_jax.sampling import Sampling, row_keys, sample
from pallas_kernels.checks import bad_type, bad_value, is_concrete, require_integers, require_shape, require_type

RECORDS = ("logits", "block_ids", "fetched")
GREEDY = Sampling(temperature=0.0)


@pytree_dataclass
class Generation:
    """tokens [B, new] int32, `pad_token` after a row stopped; lengths [B], tokens generated, a stop token included.

    Recorded on request, else None: logits [B, new, V] float32 that each token was drawn from; block_ids
    [L, B, K, new, J], the selection behind those logits; fetched [L, B, K, new], blocks that crossed from the host for
    it. Entry 0 of each belongs to the last prompt position, whose blocks are placed by the prefill: it fetches none.
    After a row stopped its logits and fetches are 0 and its ids -1. `full` attention has no block_ids and no fetches.
    """

    tokens: Any
    lengths: Any
    logits: Any = None
    block_ids: Any = None
    fetched: Any = None


def generate(
    model: NosaLM,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    max_new_tokens: int = 64,
    cache: CacheConfig = CacheConfig(),
    sampling: Sampling = GREEDY,
    key: Any = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    record: bool | Iterable[str] = False,
    forced_tokens: ArrayLike | None = None,
    forced_block_ids: ArrayLike | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues the prompts: prefill, then one `lax.while_loop` that ends when all rows stopped.

    tokens: int [B, T], right-padded where `lengths` [B] says so. key: one key, split over the rows, or one per row [B].
    record: True, or some of "logits", "block_ids", "fetched". forced_tokens: int [B, new], taken instead of sampled
    ones. forced_block_ids: int [L, B, K, new, J] as recorded, used instead of selecting.
    chunk: prompt tokens read at once, see `prefill`.
    mesh: devices of this host that share the rows, each with its own part of the host store; B must be a multiple of
    their number. Every device holds all weights: place them once, `jax.device_put(model, NamedSharding(mesh, P()))`.
    Raises ValueError or TypeError for bad input, CacheTooLargeError before anything is allocated.
    """
    mesh = None if mesh is None else _checked_mesh(mesh, model, tokens)
    devices = 1 if mesh is None else mesh.size
    arguments = _check(
        model, tokens, lengths, max_new_tokens, cache, sampling, key, stop_tokens, pad_token, chunk, devices
    )
    names = _record_names(record)
    batch = arguments["tokens"].shape[0]
    if forced_tokens is not None:
        forced_tokens = layout.as_tokens(forced_tokens, model.config.vocab_size, name="forced_tokens")
        require_shape("forced_tokens", forced_tokens, (batch, max_new_tokens), "[B, max_new_tokens]")
    if forced_block_ids is not None:
        forced_block_ids = _check_forced_ids(model, forced_block_ids, arguments["lengths"], max_new_tokens)
    arguments |= {"forced_tokens": forced_tokens, "forced_ids": forced_block_ids}
    options = _Options(max_new_tokens, cache, sampling, names, chunk)
    if mesh is not None and is_concrete(*arguments.values()):
        for name, spec in _split(mesh, arguments).items():
            arguments[name] = jax.device_put(arguments[name], NamedSharding(mesh, spec))
    return _generate(model, arguments, options=options, mesh=mesh)


def stream(
    model: NosaLM,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    max_new_tokens: int = 64,
    cache: CacheConfig = CacheConfig(),
    sampling: Sampling = GREEDY,
    key: Any = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    chunk: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields one int32 array [B] per step, `pad_token` for rows that stopped; the tokens that `generate` would return.

    Ends when every row stopped, so it may yield fewer than `max_new_tokens` steps; `generate` pads to that many.
    Arguments and errors as in `generate`; they are checked at the call, not at the first token.
    """
    arguments = _check(model, tokens, lengths, max_new_tokens, cache, sampling, key, stop_tokens, pad_token, chunk)
    return _stream(model, arguments, max_new_tokens, cache, sampling, chunk)


def _stream(
    model: NosaLM,
    arguments: dict[str, Any],
    max_new_tokens: int,
    cache: CacheConfig,
    sampling: Sampling,
    chunk: int | None,
) -> Iterator[np.ndarray]:
    prompt, lengths = arguments["tokens"], arguments["lengths"]
    keys, stop, pad = arguments["keys"], arguments["stop"], arguments["pad"]
    state, out = decode._prefill(
        model, prompt, lengths, max_length=prompt.shape[1] + max_new_tokens, cache=cache, chunk=chunk
    )
    done = jnp.zeros(lengths.shape, bool)
    token, done = _next_token(out.logits, keys, state.lengths, done, stop, pad, sampling)
    yield np.asarray(jax.device_get(token))
    for _ in range(1, max_new_tokens):
        if bool(jax.device_get(done.all())):
            return
        state, token, done = _stream_step(model, state, token, done, keys, stop, pad, sampling)
        yield np.asarray(jax.device_get(token))


@functools.partial(
    jax.jit, static_argnames="sampling", donate_argnames="state", compiler_options=decode.COMPILER_OPTIONS
)
def _stream_step(
    model: NosaLM,
    state: DecodeState,
    token: Array,
    done: Array,
    keys: Array | None,
    stop: Array,
    pad: Array,
    sampling: Sampling,
) -> tuple[DecodeState, Array, Array]:
    state, out = decode.step(model, state, token, ~done)
    token, done = _next_token(out.logits, keys, state.lengths, done, stop, pad, sampling)
    return state, token, done


def _next_token(
    logits: Float[Array, "B V"],
    keys: Array | None,
    positions: Int32[Array, " B"],
    done: Bool[Array, " B"],
    stop: Int32[Array, " n"],
    pad: Int32[Array, ""],
    sampling: Sampling,
    forced: Int32[Array, " B"] | None = None,
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """The next token of every row, `pad` where it is done, and who is done after it."""
    token = sample(logits, keys, positions, sampling) if forced is None else forced
    token = jnp.where(done, pad, token)
    return token, done | (token[:, None] == stop).any(-1)


class _Options(NamedTuple):
    """What a generation is compiled for."""

    max_new_tokens: int
    cache: CacheConfig
    sampling: Sampling
    names: tuple[str, ...]
    chunk: int | None


def _split(mesh: Mesh, names: Iterable[str]) -> dict[str, PartitionSpec]:
    """How the arguments and results of `_generate_rows` that have these names are split over the mesh."""
    specs = dict.fromkeys(names, PartitionSpec(mesh.axis_names))
    of_layers = dict.fromkeys(("forced_ids", "block_ids", "fetched"), PartitionSpec(None, mesh.axis_names))
    of_all = dict.fromkeys(("stop", "pad"), PartitionSpec())
    return specs | {name: spec for name, spec in (of_layers | of_all).items() if name in specs}


@decode.program(static_argnames=("options", "mesh"))
def _generate(model: NosaLM, arguments: dict[str, Any], *, options: _Options, mesh: Mesh | None) -> Generation:
    """arguments: those of `_generate_rows`."""
    if mesh is None:
        return _generate_rows(model, **arguments, options=options)
    kept = [name for name in options.names if name == "logits" or model.config.attention.is_sparse]
    # Devices never talk to each other: each stops when its own rows have stopped.
    run = jax.shard_map(
        lambda model, arguments: _generate_rows(model, **arguments, options=options),
        mesh=mesh,
        in_specs=(PartitionSpec(), _split(mesh, arguments)),
        out_specs=Generation(**_split(mesh, ("tokens", "lengths", *kept))),
        check_vma=False,
    )
    return run(model, arguments)


def _generate_rows(
    model: NosaLM,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    keys: Array | None,
    stop: Int32[Array, " n"],
    pad: Int32[Array, ""],
    forced_tokens: Int32[Array, "B new"] | None,
    forced_ids: Int32[Array, "L B K new J"] | None,
    *,
    options: _Options,
) -> Generation:
    max_new_tokens, cache, sampling, names, chunk = options

    def forced(step: Any) -> tuple[Array | None, Array | None]:
        at = lambda x, axis: None if x is None else jax.lax.dynamic_index_in_dim(x, step, axis, keepdims=False)
        return at(forced_tokens, 1), at(forced_ids, 3)

    max_length = tokens.shape[1] + max_new_tokens
    first_token, first_ids = forced(0)
    state, out = decode._prefill(model, tokens, lengths, first_ids, max_length=max_length, cache=cache, chunk=chunk)
    done = jnp.zeros(lengths.shape, bool)
    token, done = _next_token(out.logits, keys, state.lengths, done, stop, pad, sampling, first_token)
    # What is collected, one entry per step first, so that a step writes one contiguous piece.
    entry = {name: value for name in names if (value := getattr(out, name)) is not None} | {"tokens": token}
    fills: dict[str, Any] = {"tokens": pad, "block_ids": -1}
    collected = {
        name: jnp.full((max_new_tokens, *x.shape), fills.get(name, 0), x.dtype).at[0].set(x)
        for name, x in entry.items()
    }
    count = jnp.ones(lengths.shape, jnp.int32)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, _, done, _, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, state, token, done, count, collected = carry
        next_forced, ids = forced(step)
        active = ~done
        state, out = decode.step(model, state, token, active, ids)
        token, done = _next_token(out.logits, keys, state.lengths, done, stop, pad, sampling, next_forced)
        entry = {"tokens": token, "block_ids": out.block_ids, "fetched": out.fetched}
        if "logits" in collected:
            entry["logits"] = jnp.where(active[:, None], out.logits, 0)
        collected = {name: x.at[step].set(entry[name]) for name, x in collected.items()}
        return step + 1, state, token, done, count + active, collected

    carry = (jnp.int32(1), state, token, done, count, collected)
    _, _, _, _, count, collected = jax.lax.while_loop(unfinished, body, carry)
    time_axis = {"tokens": 1, "logits": 1, "block_ids": 3, "fetched": 3}
    return Generation(lengths=count, **{name: jnp.moveaxis(x, 0, time_axis[name]) for name, x in collected.items()})


def _check(
    model: NosaLM,
    tokens: Any,
    lengths: Any,
    max_new_tokens: int,
    cache: CacheConfig,
    sampling: Sampling,
    key: Any,
    stop_tokens: Iterable[int],
    pad_token: int,
    chunk: int | None,
    devices: int = 1,
) -> dict[str, Any]:
    """The checked arguments that generate and stream share."""
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    require_type("sampling", sampling, Sampling, "Pass Sampling(temperature=0.8), for example.")
    require_type("max_new_tokens", max_new_tokens, int, "Pass a whole number.")
    vocab = model.config.vocab_size
    if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise bad_value("max_new_tokens", "must be >= 1", max_new_tokens, "Use prefill for the prompt alone.")
    decode.check_chunk(chunk)
    if not isinstance(stop_tokens, Iterable) or isinstance(stop_tokens, str):
        raise bad_type("stop_tokens", "must be a sequence of token ids", repr(stop_tokens), "Put it in a list.")
    stop = np.asarray(tuple(stop_tokens)).reshape(-1)
    if stop.size:
        require_integers("stop_tokens", stop)
    for name, values in (("stop_tokens", stop), ("pad_token", np.asarray([pad_token]))):
        if ((values < 0) | (values >= vocab)).any():
            raise bad_value(name, f"ids must be in [0, vocab_size = {vocab})", values.tolist(), "Check the tokenizer.")
    tokens = layout.as_tokens(tokens, vocab)
    max_length = tokens.shape[1] + max_new_tokens
    tokens, lengths = decode.check_prompt(model, tokens, lengths, max_length, cache, devices)
    return {
        "tokens": tokens,
        "lengths": lengths,
        "keys": row_keys(key, tokens.shape[0], sampling),
        # Never empty: XLA, compiling for several GPUs, crashes on an array without elements.
        "stop": jnp.asarray(stop if stop.size else [-1], jnp.int32),
        "pad": jnp.int32(pad_token),
    }


def _checked_mesh(mesh: Any, model: NosaLM, tokens: Any) -> Mesh:
    """The mesh with axes that shard_map takes. Raises ValueError where rows or weights do not go with its devices."""
    require_type("mesh", mesh, Mesh, "Make one with jax.make_mesh.")
    rows = np.shape(tokens)[0] if np.ndim(tokens) == 2 else mesh.size
    if rows % mesh.size:
        raise bad_value("mesh", f"must have a number of devices that divides B = {rows}", mesh.size, "Add rows.")
    weights = model.embed[...]
    is_placed = is_concrete(weights) and getattr(weights, "committed", False)
    if is_placed and weights.sharding.device_set != set(mesh.devices.flat):
        raise bad_value(
            "model",
            "must lie on all devices of the mesh",
            sorted(str(device) for device in weights.sharding.device_set),
            "Place it once: jax.device_put(model, NamedSharding(mesh, PartitionSpec())).",
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _record_names(record: bool | Iterable[str]) -> tuple[str, ...]:
    if isinstance(record, bool):
        return RECORDS if record else ()
    names = (record,) if isinstance(record, str) else tuple(record)
    unknown = sorted(set(names) - set(RECORDS))
    if unknown:
        raise bad_value("record", f"must be a bool or names among {RECORDS}", unknown, "Remove the unknown names.")
    return tuple(name for name in RECORDS if name in names)


def _check_forced_ids(model: NosaLM, ids: Any, lengths: Array, new: int) -> Array:
    """Checked [L, B, K, new, J]: entry s belongs to the query at position lengths - 1 + s."""
    require_integers("forced_block_ids", ids)
    positions = lengths[:, None] - 1 + jnp.arange(new, dtype=jnp.int32)
    ids = as_block_ids(model.config, ids, positions, name="forced_block_ids")
    assert ids is not None
    if is_concrete(ids, lengths):
        own = (positions // model.config.attention.block_size)[None, :, None, :, None]
        recorded = (ids >= 0).any(-1)  # rows that had stopped recorded nothing
        recorded = recorded.at[..., 0].set(True)
        if not bool(jnp.all((ids == own).any(-1) | ~recorded)):
            raise bad_value(
                "forced_block_ids",
                "every selection must hold the query's own block, where its token is written",
                "a selection without it",
                "Add the own block to each selection.",
            )
    return ids
