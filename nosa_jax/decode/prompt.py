"""Reading many tokens at once into a cache: prefill of new rows, extension of running ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from nosa_jax import parallel
from nosa_jax.attention import layout
from nosa_jax.cache.pages import Rooms, own_rooms, rooms_of
from nosa_jax.cache.state import DecodeState, device_bytes, empty_state, policy_sizes, specs
from nosa_jax.cache.working_set import Limits, as_limits, plan_reading, rounded
from nosa_jax.config import CacheConfig
from nosa_jax.decode import checks, widths
from nosa_jax.decode.checks import Prompt
from nosa_jax.decode.program import READING_OPTIONS, program
from nosa_jax.decode.reading import read_by_steps, read_groups
from nosa_jax.decode.step import StepOutput, output_specs
from nosa_jax.model import NosaLM
from pallas_kernels import blocks
from pallas_kernels.checks import IntegersLike, is_concrete, is_tracing

State = tuple[DecodeState, Float[Array, "B V"]]


def prefill(
    model: NosaLM,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    max_length: IntegersLike,
    cache: CacheConfig = CacheConfig(),
    chunk: int | None = None,
    working_set: int | None = None,
    dense: bool = False,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads the prompts into a new state. Returns it with the float32 logits after each prompt's last token.

    tokens: int [B, T], right-padded where `lengths` [B] says so.
    lengths: int [B], tokens of each row; None: all T.
    max_length: what a row may grow to, prompt included: an int, or one per row [B]. Then the host store has only the
        pages that the limits need, ceil(limit / P) per row, and a program is compiled for each number of pages. Under
        `jax.jit` they must be known, as NumPy arrays and lists are.
    cache: where the KV cache lives. With a policy prompts are read whole, with dense attention, and leave behind what
        it keeps: `chunk` must be None, and the host store has pages for all units of every row. On the device there is
        room for the tokens that the row furthest from its limit may generate, so tell `lengths` outside of `jax.jit`.
    chunk: tokens of a row read at once, each chunk over the cache of those before it; None reads rows whole where they
        fit `working_set`, and else in chunks that do.
    working_set: bytes of device memory to hold meanwhile, beside weights and cache; None for 2 GiB. Rows are read in
        groups that fit; more memory does not make it much faster.
    dense: whether the prompt's tokens attend to all before them, without a bias, as those of `full` do. What they leave
        behind is the variant's, the selection of each row's last token included, so that decoding goes on sparse.

    On a mesh every device reads its own rows with the whole model: weights that are cut along `fsdp` or `tensor` are
    gathered at every call. To decode much, place them whole first: `jax.device_put(model, NamedSharding(mesh, P()))`.

    Outside `jax.jit` the tokens are padded to one of a few widths, so that prompts of most lengths share a program.
    Raises ValueError for bad input, a working set too small for one row included, and CacheTooLargeError, before
    anything is allocated, when cache and working set do not fit.
    """
    prompt = checks.as_prompt(model, tokens, lengths)
    limits = as_limits(chunk, working_set, dense)
    devices = checks.row_devices(prompt.batch, model, prompt)
    max_length, row_limits, new = checks.check_cache(
        model, prompt, max_length, cache, limits, devices, padded=lengths is not None
    )
    rooms, pages = None, None
    if row_limits is not None:
        rooms, pages = rooms_of(row_limits, model.config.attention.block_size, devices)
    if not is_tracing():
        prompt = padded_prompt(prompt)
    model, prompt = checks.untransformed((model, prompt))
    state, out = read_prompt(
        model, prompt, rooms=rooms, max_length=max_length, pages=pages, cache=cache, limits=limits, new=new
    )
    return state, out.logits


def padded_prompt(prompt: Prompt) -> Prompt:
    """The prompt, padded to a width that others share."""
    return Prompt(widths.padded(prompt.tokens, rounded(prompt.width)), prompt.lengths)


def extend(
    model: NosaLM,
    state: DecodeState,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    working_set: int | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads any number of further tokens into a running state: the next turn, or the next chunk of a prompt.

    tokens: int [B, n]; row b gets the first `lengths[b]` of them, 0 leaves it as it is. Returns the new state and the
    logits after each row's last token (meaningless where a row got none). The old state stays valid, so what it holds
    is copied, in host memory, too; `jit_extend` goes on in place. Outside `jax.jit` the tokens are read in pieces of
    64, 512 or 4096, so that turns of any lengths share a few programs. Under jit, where values cannot be checked,
    tokens beyond a row's limit are dropped. What a layer holds of the rows that grow is staged on the device, one layer
    at a time, in groups of rows that fit `working_set` (see `prefill`).

    With a policy further tokens are what generated ones are to it, whoever wrote them, and are read one by one, each in
    a decode step: ShadowKV keeps all of them on the device, and ArkVale has them in its pages.

    Raises TypeError or ValueError for a state of another model, wrong shapes and, outside jit, wrong values, and
    CacheTooLargeError where the working set does not fit.
    """
    return _extend(_read_more, model, state, tokens, lengths, working_set, copies=True)


def jit_extend(
    model: NosaLM,
    state: DecodeState,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    working_set: int | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """`extend` with the state donated: go on with the state that it returns, as the one passed in is gone.

    Errors as in `extend`, before the state is touched.
    """
    return _extend(_read_more_in_place, model, state, tokens, lengths, working_set, copies=False)


def _extend(
    run: Callable[..., State], model: NosaLM, state: DecodeState, tokens: Any, lengths: Any, working_set: Any, *,
    copies: bool,
) -> State:  # fmt: skip
    """copies: whether `run` leaves the state as it is."""
    checks.check_model(model)
    tokens = layout.as_tokens(tokens, model.config.vocab_size)
    batch, width = tokens.shape
    checks.check_state(model, state, batch)
    lengths = layout.as_lengths(lengths, batch, width, minimum=0)
    count = jnp.asarray(np.full(batch, width, np.int32)) if lengths is None else lengths
    checks.check_room(state, count)
    limits = as_limits(None, working_set)
    model, state, tokens, count = checks.untransformed((model, state, tokens, count))
    logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    if is_tracing() or not is_concrete(tokens, count) or not tokens.is_fully_addressable:
        checks.check_working_set(model, state, width, limits, copies=copies)
        return run(model, state, tokens, count, logits, limits=limits)
    tokens, count = np.asarray(tokens), np.asarray(count)
    parts = list(widths.pieces(max(1, int(count.max(initial=0)))))
    for size in {size for _, size in parts}:
        checks.check_working_set(model, state, size, limits, copies=copies)
    for begin, size in parts:
        part = widths.padded(jnp.asarray(tokens[:, begin : begin + size]), size)
        in_part = jnp.asarray(np.clip(count - begin, 0, size))
        state, logits = run(model, state, part, in_part, logits, limits=limits)
        run = _read_more_in_place  # the states in between are nobody's
    return state, logits


def _more(
    model: NosaLM,
    state: DecodeState,
    tokens: Int32[Array, "B n"],
    count: Int32[Array, " B"],
    logits: Float[Array, "B V"],
    *,
    limits: Limits,
) -> State:
    """`extend` by checked tokens. logits: of rows that get none."""
    rows, of_state = PartitionSpec(parallel.ROWS), specs(state)

    def body(model: NosaLM, state: DecodeState, tokens: Array, count: Array, logits: Array) -> State:
        if state.policy is not None:
            state, out = read_by_steps(model, state, tokens, count)
            return state, jnp.where((count > 0)[:, None], out.logits, logits)
        reading = plan_reading(
            model.config, len(tokens), tokens.shape[1], state.num_blocks,
            dtype=model.embed.dtype, row_bytes=device_bytes(state) // len(tokens), fresh=False,
            offloaded=state.host is not None, limits=limits,
        )  # fmt: skip
        state, out = read_groups(model, state, tokens, count, None, reading, fresh=False, dense=limits.dense)
        return state, jnp.where((count > 0)[:, None], out.logits, logits)

    return parallel.by_rows(
        parallel.mesh_of(model, state, tokens),
        body,
        (model, state, tokens, count, logits),
        (PartitionSpec(), of_state, rows, rows, rows),
        (of_state, rows),
    )


_read_more = program(READING_OPTIONS, static_argnames="limits")(_more)
_read_more_in_place = program(READING_OPTIONS, static_argnames="limits", donate_argnames="state")(_more)


@program(READING_OPTIONS, static_argnames=("max_length", "pages", "cache", "limits", "new"))
def read_prompt(
    model: NosaLM,
    prompt: Prompt,
    forced_block_ids: Int32[Array, "L B K J"] | None = None,
    rooms: Rooms | None = None,
    *,
    max_length: int,
    pages: int | None = None,
    cache: CacheConfig,
    limits: Limits,
    new: int | None = None,
) -> tuple[DecodeState, StepOutput]:
    """`prefill` of a checked prompt.

    forced_block_ids: replace the selection of each row's last token, see `blocks.replace_selection`.
    rooms: of the rows; None where all may grow to `max_length`, which is the most that any may.
    pages: of the host store on each device; None for one per block of every row.
    new: with a policy, room for generated tokens: no row's limit is further from its prompt.
    """
    config, dtype = model.config, model.embed.dtype
    num_blocks = blocks.num_blocks(max_length, config.attention.block_size)
    width = prompt.width

    def make(rooms: Rooms) -> DecodeState:
        batch = len(rooms.limits)
        sizes = None if new is None else policy_sizes(config, batch, max_length, width, new)
        return empty_state(config, batch, max_length, cache, dtype, rooms, pages, sizes)

    def body(model: NosaLM, prompt: Prompt, forced: Array | None, rooms: Rooms) -> tuple[DecodeState, StepOutput]:
        state = make(rooms)
        reading = plan_reading(
            config, prompt.batch, prompt.width, num_blocks,
            dtype=dtype, row_bytes=device_bytes(state) // prompt.batch, fresh=True,
            offloaded=state.host is not None, limits=limits, whole_rows=cache.policy is not None,
        )  # fmt: skip
        return read_groups(model, state, prompt.tokens, prompt.lengths, forced, reading, fresh=True, dense=limits.dense)

    if rooms is None:
        rooms = own_rooms(prompt.batch, max_length, config.attention.block_size)
    if new is not None:
        rooms = rooms._replace(limits=jnp.minimum(rooms.limits, prompt.lengths + new))
    rows, of_layers = PartitionSpec(parallel.ROWS), PartitionSpec(None, parallel.ROWS)
    return parallel.by_rows(
        parallel.mesh_of(model, prompt),
        body,
        (model, prompt, forced_block_ids, rooms),
        (PartitionSpec(), rows, of_layers, rows),
        (specs(jax.eval_shape(make, rooms)), output_specs(config, cache.policy)),
    )
