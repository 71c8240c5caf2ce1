"""What prefill, decode steps and generation are given, checked once before any work or memory is spent."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from nosa_jax import parallel
from nosa_jax._pytree import pytree_dataclass
from nosa_jax.attention import layout
from nosa_jax.cache.fitting import require_fitting
from nosa_jax.cache.memory import device_limit, host_limit
from nosa_jax.cache.pages import as_row_limits, blocks_of, pages_of_a_device
from nosa_jax.cache.plan import GB, CacheTooLargeError, plan
from nosa_jax.cache.state import DecodeState, device_bytes
from nosa_jax.cache.working_set import Limits, plan_reading, rounded_room
from nosa_jax.config import CacheConfig
from nosa_jax.model import NosaLM, as_block_ids
from pallas_kernels.checks import bad_type, bad_value, is_concrete, require_int, require_type
from pallas_kernels.promotion import usual_promotion


@pytree_dataclass
class Prompt:
    """Checked prompts: tokens int32 [B, T], right-padded; lengths int32 [B], the tokens of each row, at least 1."""

    tokens: Any
    lengths: Any

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """T, the longest prompt with its padding."""
        return self.tokens.shape[1]


def as_prompt(model: NosaLM, tokens: Any, lengths: Any) -> Prompt:
    """The checked prompt. `lengths` may be None: every row is as long as it is wide.

    Raises TypeError or ValueError for another model, wrong shapes and dtypes, and, outside `jax.jit`, wrong values.
    """
    check_model(model)
    tokens = layout.as_tokens(tokens, model.config.vocab_size)
    batch, width = tokens.shape
    lengths = layout.as_lengths(lengths, batch, width)
    return Prompt(tokens, jnp.asarray(np.full(batch, width, np.int32)) if lengths is None else lengths)


def check_model(model: Any) -> None:
    """Raises TypeError unless it is a NosaLM."""
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")


def check_cache(
    model: NosaLM,
    prompt: Prompt,
    max_length: Any,
    cache: Any,
    limits: Limits,
    devices: int = 1,
    records: int = 0,
    new: int | None = None,
    padded: bool = True,
) -> tuple[int, np.ndarray | None, int | None]:
    """`max_length` as an int, and one per row [B] where that was given, of which the int is the largest; and the room
    for generated tokens of any row that a policy keeps, None without one.

    Raises unless the prompt fits into rows of so many tokens, and their cache into memory.

    devices: how many share the rows. records: bytes per row that are recorded beside the cache. new: tokens that any
    row generates, at most; None for what limits and lengths say. padded: whether any row may be shorter than others.
    Raises TypeError, ValueError, or CacheTooLargeError with what is needed.
    """
    require_type("cache", cache, CacheConfig, "Pass CacheConfig(...).")
    rows, row_limits = prompt.batch // devices, as_row_limits(max_length, prompt.batch)
    if row_limits is None:
        rule = f"must be an int >= tokens.shape[1] = {prompt.width}"
        max_length = require_int("max_length", max_length, prompt.width, rule)
    else:
        _check_row_limits(prompt, row_limits)
        max_length = int(row_limits.max())
    read = {"prompt": min(prompt.width, max_length), "chunk": limits.chunk, "working_set": limits.working_set}
    if cache.policy is not None:
        read["new"] = new = new_room(prompt, max_length, row_limits, padded=padded) if new is None else new
    one_device = plan(model.config, rows, max_length, cache, dtype=model.embed.dtype, **read)
    if row_limits is not None and cache.policy is None:
        counts = blocks_of(row_limits, model.config.attention.block_size)
        one_device = one_device.with_pages(pages_of_a_device(counts, devices))
    if records:
        one_device = dataclasses.replace(one_device, device=one_device.device | {"records": rows * records})
    one_device.require_memory(allocated=("weights",), devices=devices)
    return max_length, row_limits, new


def new_room(prompt: Prompt, max_length: int, row_limits: np.ndarray | None, *, padded: bool) -> int:
    """The most tokens that any row may generate, as far as lengths are known, and a little more.

    padded: whether any row may be shorter than the longest.
    """
    lengths: Any = 1 if padded else prompt.width
    if is_concrete(prompt.lengths):
        lengths = np.asarray(jax.device_get(prompt.lengths))
    return rounded_room(int(np.max((max_length if row_limits is None else row_limits) - lengths)))


def _check_row_limits(prompt: Prompt, row_limits: np.ndarray) -> None:
    """Raises ValueError for a limit below the row's prompt, where that can be seen."""
    if not is_concrete(prompt.lengths):
        return
    lengths = np.asarray(jax.device_get(prompt.lengths))
    row = int(np.argmax(lengths - row_limits))
    if lengths[row] > row_limits[row]:
        got = f"{row_limits[row]} for row {row} of {lengths[row]} tokens"
        raise bad_value("max_length", "must be at least as long as the row's prompt", got, "Raise it.")


def row_devices(rows: int, *trees: Any) -> int:
    """How many devices share the rows of a call, by the mesh that its arguments lie on; see `parallel.by_rows`."""
    mesh = parallel.mesh_of(*trees)
    return (
        1 if mesh is None else parallel.size_of(mesh, parallel.fitting(mesh, (rows,), PartitionSpec(parallel.ROWS))[0])
    )


def check_working_set(model: NosaLM, state: DecodeState, width: int, limits: Limits, *, copies: bool) -> None:
    """Raises CacheTooLargeError unless reading `width` more tokens fits into device memory.

    copies: whether there will be two states.
    """
    devices = row_devices(state.lengths.shape[0], model, state)
    rows, held = state.lengths.shape[0] // devices, device_bytes(state) // devices
    # With a policy it is a loop of decode steps, which hold next to nothing.
    reading = None if state.policy is not None else plan_reading(
        model.config, rows, width, state.num_blocks,
        dtype=model.embed.dtype, row_bytes=held // rows, fresh=False, offloaded=state.host is not None, limits=limits,
    )  # fmt: skip
    remedy = "Lower working_set, or go on in place with jit_extend" if copies else "Lower working_set"
    if copies and state.host is not None and 2 * state.host.nbytes > (host := host_limit()).size:
        raise CacheTooLargeError(
            f"extend: a copy of the host store must fit beside it, got {2 * state.host.nbytes / GB:.2f} GB needed and "
            f"{host.size / GB:.2f} GB available ({host.source}). Go on in place with jit_extend."
        )
    needed, free = (0 if reading is None else reading.bytes) + held * copies, device_limit()
    if needed > free.size:
        raise CacheTooLargeError(
            f"extend: what it holds must fit in device memory, got {needed / GB:.2f} GB needed and "
            f"{free.size / GB:.2f} GB available ({free.source}). {remedy}."
        )


def check_state(model: NosaLM, state: DecodeState, batch: int) -> None:
    """Raises TypeError or ValueError unless `model` could have made the state, of `batch` rows."""
    require_type("state", state, DecodeState, "Take the one that prefill returns.")
    require_fitting(state, model.config, model.embed.dtype)
    rows = state.lengths.shape[0]
    if batch != rows:
        raise bad_value("tokens", f"must have the state's {rows} rows", batch, "Pass one row of tokens per row of it.")


def check_room(state: DecodeState, count: Any) -> None:
    """Raises ValueError when `count` more tokens would pass a row's limit, where values can be seen."""
    if not is_concrete(state.lengths, state.limits, count):
        return
    lengths, limits, count = jax.device_get((state.lengths, state.limits, count))
    totals = lengths + count
    row = int(np.argmax(totals - limits))
    if totals[row] > limits[row]:
        raise bad_value(
            "tokens",
            f"rows may not grow beyond their limits (state.limits), row {row} has max_length = {limits[row]}",
            f"{totals[row]} for row {row}",
            "Prefill with a larger max_length.",
        )


@usual_promotion
def as_forced_block_ids(model: NosaLM, ids: Any, prompt: Prompt, new: int) -> Int32[Array, "L B K new J"]:
    """Checked selections of a generation: entry s belongs to the query at position prompt.lengths - 1 + s."""
    positions = prompt.lengths[:, None] - 1 + jnp.arange(new, dtype=jnp.int32)
    ids = as_block_ids(model.config, ids, positions, name="forced_block_ids")
    assert ids is not None
    if is_concrete(ids, prompt.lengths):
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


def untransformed[T](inputs: T) -> T:
    """`inputs` as they are, which `jax.vmap` and gradients of any kind refuse to pass, now or under a jit around it."""
    leaves, structure = jax.tree.flatten(inputs)
    return inputs if is_concrete(*leaves) else jax.tree.unflatten(structure, _untransformed(*leaves))


@jax.custom_batching.custom_vmap
def _unbatched(*arrays: Array) -> tuple[Array, ...]:
    return arrays


@_unbatched.def_vmap
def _refuse_vmap(*_: Any) -> Any:
    remedy = "Put all rows into one batch [B, T]: every row is computed as if it were alone."
    raise bad_type("jax.vmap", "cannot go around prefill, extend, decode_step or generate", "one of them", remedy)


@jax.custom_jvp
def _untransformed(*arrays: Array) -> tuple[Array, ...]:
    return _unbatched(*arrays)


@_untransformed.defjvp
def _refuse_gradient(*_: Any) -> Any:
    remedy = "Use nosa_jax.forward for gradients, or jax.lax.stop_gradient(model) where none is wanted."
    raise bad_type("gradient", "cannot pass through prefill, extend, decode_step or generate", "one of them", remedy)
