"""Text generation: `generate`, one jitted loop, and `stream`, the same step token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.attention import layout
from nosa_jax.config import CacheConfig
from nosa_jax.decode import checks
from nosa_jax.decode.checks import Prompt
from nosa_jax.decode.program import READING_OPTIONS, program
from nosa_jax.decode.prompt import padded_prompt, read_prompt
from nosa_jax.decode.request import Options, Request, as_options, as_request, max_length_of
from nosa_jax.decode.sampling import Sampling, has_finite_best, sample
from nosa_jax.decode.step import StepOutput, run_step
from nosa_jax.model import NosaLM
from pallas_kernels.checks import (
    IntegersLike,
    bad_type,
    bad_value,
    is_concrete,
    is_tracing,
    require_int,
    require_shape,
    require_type,
)

GREEDY = Sampling(temperature=0.0)

Record = bool | Iterable[str]


@pytree_dataclass
class Generation:
    """tokens [B, new] int32, `pad_token` after a row stopped; lengths [B], tokens generated, a stop token included.

    failed [B] bool: rows that ended because their next logits had no finite best to draw (NaN from the weights or an
    overflow), after `lengths` good tokens. Look at it where `generate` runs under `jax.jit`; elsewhere it raises.

    Recorded on request, else None: logits [B, new, V] float32 that each token was drawn from; block_ids
    [L, B, K, new, J], the selection behind those logits; fetched [L, B, K, new], blocks that crossed from the host for
    it. Entry 0 of each belongs to the last prompt position, whose blocks are placed by the prefill: it fetches none.
    After a row stopped its logits and fetches are 0 and its ids -1. `full` attention has no block_ids and no fetches;
    with a policy they are its J wanted units, chunks by score (ShadowKV) or pages ascending, alike for all KV heads
    (ArkVale, which wants none after the prompt and while all pages fit), and those of them that crossed.
    """

    tokens: Any
    lengths: Any
    logits: Any = None
    block_ids: Any = None
    fetched: Any = None
    failed: Any = None


@pytree_dataclass
class Step:
    """One step of a generation: tokens int32 [B], `pad_token` for rows that stopped before it.

    Recorded on request, else None, as in `Generation` without its axis of steps: logits [B, V], block_ids [L, B, K, J],
    fetched [L, B, K].
    """

    tokens: Any
    logits: Any = None
    block_ids: Any = None
    fetched: Any = None

    def keep(self, names: Iterable[str]) -> Step:
        """The tokens and what has one of these names."""
        return Step(self.tokens, **{name: getattr(self, name) for name in names})


@pytree_dataclass
class Loop:
    """A generation between two steps.

    state: the cache, of all tokens but the last.
    tokens: int32 [B], drawn last and not read yet.
    done: bool [B], rows that have ended.
    lengths: int32 [B], tokens drawn, a stop token included.
    failed: bool [B], rows that have ended because there was nothing to draw, see `Generation`.
    """

    state: Any
    tokens: Any
    done: Any
    lengths: Any
    failed: Any


def generate(
    model: NosaLM,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    max_new_tokens: int = 64,
    cache: CacheConfig = CacheConfig(),
    sampling: Sampling = GREEDY,
    key: Any = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    record: Record = False,
    forced_tokens: IntegersLike | None = None,
    forced_block_ids: IntegersLike | None = None,
    chunk: int | None = None,
    working_set: int | None = None,
    dense: bool = False,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues the prompts: prefill, then one `lax.while_loop` that ends when all rows stopped.

    tokens: int [B, T], right-padded where `lengths` says so.
    lengths: int [B], tokens of each prompt; None: all T.
    max_new_tokens: tokens to generate per row, at most.
    cache: where the KV cache lives.
    sampling: how a token is drawn from logits.
    key: one random key, split over the rows, or one per row [B]; greedy sampling needs none.
    stop_tokens: tokens that end a row.
    pad_token: stands after a row's end.
    record: True, or some of "logits", "block_ids", "fetched".
    forced_tokens: int [B, new], taken instead of sampled ones.
    forced_block_ids: int [L, B, K, new, J] as recorded, used instead of selecting; where a selection is -1 alone, as
        after a row had stopped, the model selects.
    chunk, working_set, dense: how the prompts are read, see `prefill`.
    mesh: devices of this host that share the rows, each with its own part of the host store; B must be a multiple of
        their number. Every device holds all weights: place them once,
        `jax.device_put(model, NamedSharding(mesh, PartitionSpec()))`.

    Outside `jax.jit` prompts and room for new tokens are padded to one of a few sizes, so that calls of most lengths
    share a program, whatever the temperature.
    Raises ValueError or TypeError for bad input, CacheTooLargeError before anything is allocated, and, outside
    `jax.jit`, FloatingPointError where a row's logits have no finite best; inside look at `Generation.failed`.
    """
    new = require_int("max_new_tokens", max_new_tokens, 1)
    prompt = _as_prompt(model, tokens, lengths)
    mesh = None if mesh is None else _checked_mesh(mesh, model, prompt.batch)
    devices = 1 if mesh is None else mesh.size
    options = as_options(new, cache, record, chunk, working_set, dense)
    request = as_request(model, prompt, options, new, sampling, key, stop_tokens, pad_token, devices)
    if forced_tokens is not None:
        forced_tokens = layout.as_tokens(forced_tokens, model.config.vocab_size, name="forced_tokens")
        require_shape("forced_tokens", forced_tokens, (request.prompt.batch, new), "[B, max_new_tokens]")
    if forced_block_ids is not None:
        forced_block_ids = checks.as_forced_block_ids(model, forced_block_ids, request.prompt, new)
    request = dataclasses.replace(request, forced_tokens=forced_tokens, forced_block_ids=forced_block_ids)
    if mesh is not None and is_concrete(*jax.tree.leaves((model, request))):
        place = lambda spec, part: jax.device_put(part, NamedSharding(mesh, spec))
        request = jax.tree.map(place, _request_specs(mesh), request, is_leaf=_is_spec)
        # Here, as the program takes no weights that are cut along Explicit axes. Whole ones are not copied.
        model = place(PartitionSpec(), model)
    model, request = checks.untransformed((model, request))
    generation = _first_steps(_generate(model, request, options=options, mesh=mesh), new)
    if is_concrete(generation.failed):
        _require_drawn(*jax.device_get((generation.failed, generation.lengths)))
    return generation


def stream(
    model: NosaLM,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    max_new_tokens: int = 64,
    cache: CacheConfig = CacheConfig(),
    sampling: Sampling = GREEDY,
    key: Any = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    record: Record = False,
    chunk: int | None = None,
    working_set: int | None = None,
    dense: bool = False,
) -> Iterator[Any]:
    """Yields one int32 array [B] per step, `pad_token` for rows that stopped; the tokens that `generate` would return.

    tokens: int [B, T], right-padded where `lengths` says so.
    lengths: int [B], tokens of each prompt; None: all T.
    max_new_tokens: steps, at most: fewer come where every row stopped (`generate` pads to that many).
    cache: where the KV cache lives.
    sampling: how a token is drawn from logits.
    key: one random key, split over the rows, or one per row [B]; greedy sampling needs none.
    stop_tokens: tokens that end a row.
    pad_token: stands after a row's end.
    record: True, or some of "logits", "block_ids", "fetched": then a `Step` per step comes, its arrays in host memory.
    chunk, working_set, dense: how the prompts are read, see `prefill`.

    The device is a step ahead: it computes the next token while the caller has this one.
    Errors as in `generate`; arguments are checked at the call, not at the first token.
    """
    new = require_int("max_new_tokens", max_new_tokens, 1)
    options = as_options(new, cache, record, chunk, working_set, dense)
    prompt = _as_prompt(model, tokens, lengths)
    request = as_request(model, prompt, options, new, sampling, key, stop_tokens, pad_token)
    if not is_concrete(*jax.tree.leaves((model, request))):
        raise bad_type("stream", "cannot run inside jax.jit, jax.vmap or a gradient", "a traced array", "Use generate.")
    steps = _stream(model, request, options, new)
    return (one.tokens for one in steps) if not options.names else steps


def _as_prompt(model: NosaLM, tokens: Any, lengths: Any) -> Prompt:
    prompt = checks.as_prompt(model, tokens, lengths)
    return prompt if is_tracing() else padded_prompt(prompt)


def _first_steps(generation: Generation, new: int) -> Generation:
    """Without the room that was not asked for."""
    axes = {"tokens": 1, "logits": 1, "block_ids": 3, "fetched": 3}
    found = {name: getattr(generation, name) for name in axes}
    cut = {
        name: jax.lax.slice_in_dim(x, 0, new, axis=axes[name])
        for name, x in found.items()
        if x is not None and x.shape[axes[name]] > new
    }
    return dataclasses.replace(generation, **cut)


def _stream(model: NosaLM, request: Request, options: Options, new: int) -> Iterator[Step]:
    loop, following, ends = _stream_start(model, request, options=options)
    for index in range(new):
        more = index + 1 < new
        if more:  # before this step is looked at: the device goes on while it crosses and the caller has it
            loop, ahead, ends_ahead = _stream_step(model, request, loop, options=options)
        here, (done, failed, lengths) = jax.device_get((following, ends))
        _require_drawn(failed, lengths)
        yield jax.tree.map(np.array, here)
        if done.all():
            return
        if more:
            following, ends = ahead, ends_ahead


def _require_drawn(failed: np.ndarray, lengths: np.ndarray) -> None:
    """Raises FloatingPointError where a row has failed."""
    if failed.any():
        row = int(np.argmax(failed))
        raise FloatingPointError(
            f"logits: must have a finite best to draw a token from, got none for row {row} at step {lengths[row]} "
            f"({failed.sum()} of {failed.size} rows). Look for NaN in the weights, or for an overflow of their dtype "
            "with `record`; under jax.jit the tokens before it are returned."
        )


Ends = tuple[Array, Array, Array]  # done, failed and lengths of a loop, which outlive its donation


@program(READING_OPTIONS, static_argnames="options")
def _stream_start(model: NosaLM, request: Request, *, options: Options) -> tuple[Loop, Step, Ends]:
    loop, following = _start(model, request, options)
    return loop, following, (loop.done, loop.failed, loop.lengths)


@program(static_argnames="options", donate_argnames="loop")
def _stream_step(model: NosaLM, request: Request, loop: Loop, *, options: Options) -> tuple[Loop, Step, Ends]:
    loop, following = _advance(model, request, loop, options, None, None)
    return loop, following, (loop.done, loop.failed, loop.lengths)


def _start(model: NosaLM, request: Request, options: Options) -> tuple[Loop, Step]:
    """Reads the prompt and draws the first token."""
    prompt = request.prompt
    token, block_ids = request.forced(0)
    state, out = read_prompt(
        model, prompt, block_ids,
        max_length=max_length_of(prompt, options), cache=options.cache, limits=options.limits, new=options.new,
    )  # fmt: skip
    nothing = jnp.zeros(prompt.lengths.shape, jnp.int32)
    return _draw(request, Loop(state, nothing, nothing > 0, nothing, nothing > 0), out, options, token)


def _advance(
    model: NosaLM, request: Request, loop: Loop, options: Options, token: Array | None, block_ids: Array | None
) -> tuple[Loop, Step]:
    """Reads the last tokens and draws the next. token, block_ids: forced ones of this step."""
    state, out = run_step(model, loop.state, loop.tokens, ~loop.done, block_ids)
    return _draw(request, dataclasses.replace(loop, state=state), out, options, token)


def _draw(
    request: Request, loop: Loop, out: StepOutput, options: Options, forced: Int32[Array, " B"] | None
) -> tuple[Loop, Step]:
    """The next token of every row that is not done, and what is recorded of it."""
    active = ~loop.done
    failed = jnp.zeros_like(active)
    if forced is None:
        failed = active & ~has_finite_best(out.logits)
        forced = sample(out.logits, request.keys, loop.state.lengths, request.filter)
    token = jnp.where(active & ~failed, forced, request.pad)
    done = loop.done | failed | (token[:, None] == request.stop).any(-1)
    logits = jnp.where(active[:, None], out.logits, 0)
    following = Loop(loop.state, token, done, loop.lengths + (active & ~failed), loop.failed | failed)
    return following, Step(token, logits, out.block_ids, out.fetched).keep(options.names)


@program(static_argnames=("options", "mesh"))
def _generate(model: NosaLM, request: Request, *, options: Options, mesh: Mesh | None) -> Generation:
    """`request` for all rows, whatever devices they are split over."""
    if mesh is None:
        return _generate_rows(model, request, options)
    # Devices never talk to each other: each stops when its own rows have stopped.
    run = jax.shard_map(
        lambda model, request: _generate_rows(model, request, options),
        mesh=mesh,
        in_specs=(PartitionSpec(), _request_specs(mesh)),
        out_specs=_generation_specs(mesh),
        check_vma=False,
    )
    return run(model, request)


def _generate_rows(model: NosaLM, request: Request, options: Options) -> Generation:
    loop, first = _start(model, request, options)
    # One entry per step first, so that a step writes one contiguous piece.
    fills = Step(request.pad, 0, -1, 0)
    whole = lambda x, fill: jnp.full((options.room, *x.shape), fill, x.dtype).at[0].set(x)
    records = Step(
        **{
            field.name: None if (x := getattr(first, field.name)) is None else whole(x, getattr(fills, field.name))
            for field in dataclasses.fields(Step)
        }
    )

    def unfinished(carry: tuple[Array, Loop, Step]) -> Array:
        index, loop, _ = carry
        return (index < request.new) & ~loop.done.all()

    def body(carry: tuple[Array, Loop, Step]) -> tuple[Array, Loop, Step]:
        index, loop, records = carry
        loop, following = _advance(model, request, loop, options, *request.forced(index))
        return index + 1, loop, jax.tree.map(lambda x, one: x.at[index].set(one), records, following)

    _, loop, records = jax.lax.while_loop(unfinished, body, (jnp.int32(1), loop, records))
    last = lambda x, axis: None if x is None else jnp.moveaxis(x, 0, axis)
    return Generation(
        last(records.tokens, 1), loop.lengths,
        last(records.logits, 1), last(records.block_ids, 3), last(records.fetched, 3), loop.failed,
    )  # fmt: skip


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _request_specs(mesh: Mesh) -> Request:
    """How a request is split over the devices of a mesh: by rows, on any of its axes."""
    rows, of_layers, all_ = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names), PartitionSpec()
    return Request(
        prompt=Prompt(rows, rows), keys=rows, filter=all_, stop=all_, pad=all_, new=all_,
        forced_tokens=rows, forced_block_ids=of_layers,
    )  # fmt: skip


def _generation_specs(mesh: Mesh) -> Generation:
    rows, of_layers = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names)
    return Generation(rows, rows, rows, of_layers, of_layers, rows)


def _checked_mesh(mesh: Any, model: NosaLM, rows: int) -> Mesh:
    """The mesh with axes that shard_map takes. Raises ValueError where rows or weights do not go with its devices."""
    require_type("mesh", mesh, Mesh, "Make one with jax.make_mesh.")
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
