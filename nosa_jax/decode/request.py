"""What a generation is asked for: checked once, and split into what is compiled and what a program is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.cache.working_set import Limits, as_limits, rounded, rounded_room
from nosa_jax.config import CacheConfig, ModelConfig
from nosa_jax.decode import checks
from nosa_jax.decode.checks import Prompt
from nosa_jax.decode.sampling import Filter, Sampling, row_keys
from nosa_jax.decode.step import selected_units
from nosa_jax.model import NosaLM
from pallas_kernels.checks import as_integers, bad_type, bad_value, is_concrete, is_tracing, require_int, require_type

RECORDS = ("logits", "block_ids", "fetched")
_LEAST_STOP_TOKENS = 8


@pytree_dataclass
class Request:
    """What a generation is asked for, checked.

    prompt: tokens and lengths.
    keys: a random key per row [B]; None where sampling is greedy.
    filter: of the sampling.
    stop: int32 [n], tokens that end a row, -1 after them up to a power of two, so that lists share a program.
    pad: int32 scalar, the token of rows that have ended.
    new: int32 scalar, tokens to generate per row, at most.
    forced_tokens: int32 [B, new], taken instead of drawn ones; None draws all.
    forced_block_ids: int32 [L, B, K, new, J], replace the selections; None selects.
    """

    prompt: Any
    keys: Any
    filter: Any
    stop: Any
    pad: Any
    new: Any
    forced_tokens: Any = None
    forced_block_ids: Any = None

    def forced(self, index: Any) -> tuple[Array | None, Array | None]:
        """Token [B] and block ids [L, B, K, J] that are forced at one step."""
        at = lambda x, axis: None if x is None else jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
        return at(self.forced_tokens, 1), at(self.forced_block_ids, 3)


class Options(NamedTuple):
    """What a generation is compiled for.

    room: for new tokens of a row, at least as many as are asked for. names: what is recorded. limits: of reading the
    prompt.
    """

    room: int
    cache: CacheConfig
    names: tuple[str, ...]
    limits: Limits

    @property
    def new(self) -> int | None:
        """Room for generated tokens that a policy keeps; None without one."""
        return None if self.cache.policy is None else rounded_room(self.room)


def as_options(
    max_new_tokens: int, cache: Any, record: Any, chunk: Any, working_set: Any, dense: Any = False
) -> Options:
    """The checked options of `generate` and `stream`; see there. max_new_tokens: checked."""
    require_type("cache", cache, CacheConfig, "Pass CacheConfig(...).")
    room = max_new_tokens if is_tracing() else rounded(max_new_tokens)
    return Options(room, cache, _record_names(record), as_limits(chunk, working_set, dense))


def as_request(
    model: NosaLM,
    prompt: Prompt,
    options: Options,
    max_new_tokens: int,
    sampling: Any,
    key: Any,
    stop_tokens: Any,
    pad_token: Any,
    devices: int = 1,
) -> Request:
    """The checked request of `generate` and `stream`, which say what the arguments are.

    max_new_tokens: checked. devices: how many share the rows.
    """
    require_type("sampling", sampling, Sampling, "Pass Sampling(temperature=0.8), for example.")
    checks.check_cache(
        model, prompt, max_length_of(prompt, options), options.cache, options.limits, devices,
        _record_bytes(model.config, options), options.new,
    )  # fmt: skip
    stop = _as_stop_tokens(stop_tokens)
    pad = require_int("pad_token", pad_token, 0, f"must be an int in [0, vocab_size = {model.config.vocab_size})")
    vocab = model.config.vocab_size
    for name, ids in (("stop_tokens", stop.tolist()), ("pad_token", [pad])):
        if not all(0 <= token < vocab for token in ids):
            raise bad_value(name, f"ids must be in [0, vocab_size = {vocab})", ids, "Check the tokenizer.")
    # Never empty: XLA, compiling for several GPUs, crashes on an array without elements.
    padded = np.full(max(_LEAST_STOP_TOKENS, 1 << (stop.size - 1).bit_length()), -1, np.int32)
    padded[: stop.size] = stop
    keys = row_keys(key, prompt.batch, sampling)
    numbers = (Filter.of(sampling), padded, np.int32(pad), np.int32(max_new_tokens))
    return Request(prompt, keys, *jax.tree.map(jnp.asarray, numbers))


def max_length_of(prompt: Prompt, options: Options) -> int:
    """What the rows of a generation may grow to: one number for all of them.

    Limits by their own prompts would save pages, but the number of pages is part of a program: every batch of other
    lengths would compile one.
    """
    return prompt.width + options.room


def room_for(prompt: int, new: int) -> int:
    """What `generate` lets rows grow to outside `jax.jit`, for prompts of so many tokens and so many new ones."""
    return rounded(prompt) + rounded(new)


def _as_stop_tokens(stop_tokens: Any) -> np.ndarray:
    """int32 [n] of an iterable of token ids."""
    if isinstance(stop_tokens, str) or not isinstance(stop_tokens, Iterable):
        remedy = "Put ids in a list; those of a text come from the tokenizer."
        raise bad_type("stop_tokens", "must be a sequence of token ids", f"{stop_tokens!r:.60}", remedy)
    is_array = isinstance(stop_tokens, np.ndarray | jax.Array)
    stop_tokens = stop_tokens if is_array else list(stop_tokens)
    if not is_concrete(*jax.tree.leaves(stop_tokens)):
        raise bad_type("stop_tokens", "must be known where jax.jit traces", "a traced array", "Keep it out of the jit.")
    if is_array:
        stop_tokens = stop_tokens if stop_tokens.size else ()
    else:
        for token in stop_tokens:
            if isinstance(token, bool | np.bool_):
                raise bad_type("stop_tokens", "must hold integers", repr(token), "Pass token ids.")
    with jax.ensure_compile_time_eval():
        stop = np.asarray(as_integers("stop_tokens", stop_tokens))
    if stop.ndim != 1:
        remedy = "A row ends at any one of them: sequences of tokens are not looked for."
        raise bad_value("stop_tokens", "must be one flat sequence of ids", f"shape {stop.shape}", remedy)
    return stop


def _record_bytes(config: ModelConfig, options: Options) -> int:
    """Bytes per row of what is recorded, twice: as it is written, one entry per step first, and as it is returned."""
    if options.cache.policy is not None and options.cache.policy.refusal is not None:
        return 0  # what checks the cache says why
    heads, selected = config.num_layers * config.num_kv_heads, selected_units(config, options.cache.policy)
    sizes = {"logits": config.vocab_size, "block_ids": heads * (selected or 0), "fetched": heads}
    names = set(options.names) & {"logits"} if selected is None else options.names
    return 2 * 4 * options.room * sum(sizes[name] for name in names)


def _record_names(record: Any) -> tuple[str, ...]:
    if isinstance(record, bool | np.bool_):
        return RECORDS if record else ()
    is_one = isinstance(record, str) or not isinstance(record, Iterable) or getattr(record, "ndim", 1) == 0
    names = (record,) if is_one else tuple(record)
    unknown = [name for name in names if not (isinstance(name, str) and name in RECORDS)]
    if unknown:
        rule = f"must be a bool or names among {RECORDS}"
        raise bad_value("record", rule, f"{unknown!r:.60}", "Remove the unknown names.")
    return tuple(name for name in RECORDS if name in names)
