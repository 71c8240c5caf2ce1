"""A policy run over the arrays of one layer, prompt and steps, by the functions that an engine calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from nosa_jax import rope
from nosa_jax._pytree import pytree_dataclass
from nosa_jax.baselines import common, infllm
from nosa_jax.baselines.arkvale import ArkVale
from nosa_jax.baselines.infllm import InfLLM
from nosa_jax.baselines.shadowkv import ShadowKV
from nosa_jax.config import RopeConfig
from nosa_jax.policy import Policy, Sizes, Store
from nosa_jax.rope import Rotations
from pallas_kernels.checks import (
    IntegersLike,
    as_integers,
    bad_type,
    bad_value,
    is_concrete,
    require_floats,
    require_shape,
    require_type,
)

AnyArray = Array | np.ndarray

# The inputs of a case by policy, with their letters: T prompt tokens, N query heads, K KV heads, `steps` decode steps.
_AFTER_ROPE = {
    "k_post": "KTD",
    "v": "KTD",
    "q_last_post": "ND",
    "dec_q_post": "SND",
    "dec_k_post": "SKD",
    "dec_v": "SKD",
}
_INPUTS = {
    ShadowKV: {"k_pre": "KTD", **_AFTER_ROPE},
    ArkVale: _AFTER_ROPE,
    InfLLM: {"q": "NTD", "k": "KTD", "v": "KTD", "dec_q": "SND", "dec_k": "SKD", "dec_v": "SKD"},
}


@pytree_dataclass
class Trace:
    """What a policy did at every decode step. A leading axis B goes before all others where the case has one.

    ids: int32, the wanted units, -1 for none: ShadowKV [steps, K, s], chunks by score; ArkVale [steps, 1, k], pages
        ascending, all -1 where every page is on the device; InfLLM [steps, topk], blocks by score.
    new_ids: int32, those of them that crossed the link, -1 behind. ShadowKV's in the order of ids, others ascending.
    attended: int32 [steps, K, A], [steps, 1, A], [steps, A], positions of tokens in the order of attention, -1 behind.
    out: [steps, N, D] in the dtype of the queries.
    scores: float32 [steps, K, L] of landmarks, [steps, 1, pages], [steps, blocks].
    prompt_out: [T, N, D], what InfLLM's sparse attention makes of the prompt; None for the others, which are dense.
    prompt, last: the state after the prompt and after the last step, always with their axis B.
    """

    ids: Any
    new_ids: Any
    attended: Any
    out: Any
    scores: Any
    prompt_out: Any
    prompt: Any
    last: Any


def replay(
    policy: ShadowKV | ArkVale | InfLLM,
    case: Mapping[str, ArrayLike],
    *,
    lengths: IntegersLike | None = None,
    rope_config: RopeConfig | None = None,
) -> Trace:
    """Runs a policy over the queries, keys and values of one layer: a prompt, then a token per step.

    case: float arrays by name; others are passed over. Prompts are head-major: for ShadowKV and ArkVale `k_post`, `v`
        [K, T, D], `q_last_post` [N, D] of the last token; decode steps come first: `dec_q_post` [steps, N, D],
        `dec_k_post`, `dec_v` [steps, K, D]; "post" is after RoPE at the token's position. ShadowKV also reads `k_pre`
        [K, T, D], before it. InfLLM has no positions but its own and reads `q` [N, T, D], `k`, `v` [K, T, D], `dec_q`,
        `dec_k`, `dec_v`, all before RoPE. Each may have an axis B of rows before all others.
    lengths: int [B], tokens of each row's prompt, where the case has an axis B and rows are shorter than T. What lies
        behind them counts for nothing. `q_last_post` is of the last real token, and steps follow it.
    rope_config: None is plain RoPE of theta 10000.

    Not for use under `jax.jit`, which the parts of `nosa_jax.baselines.shadowkv`, `arkvale` and `infllm` are made for.
    Raises TypeError or ValueError for another policy, missing arrays, shapes that do not fit and a rank above K * D.
    """
    if type(policy) not in _INPUTS:
        known = ", ".join(kind.__name__ for kind in _INPUTS)
        raise bad_type("policy", f"must be one of {known}", f"{policy!r:.60}", "Pass ShadowKV(), for example.")
    if rope_config is not None:
        require_type("rope_config", rope_config, RopeConfig, "Pass RopeConfig(...), or None.")
    arrays, batched = _checked(policy, case)
    sizes = _checked_lengths(lengths, arrays["v"].shape[0], arrays["v"].shape[2])
    trace: Trace = _run(policy, arrays, sizes, rope_config or RopeConfig())
    # There is room for the most that any row might attend to; what none filled at any step is not shown.
    widest = int((np.asarray(trace.attended) >= 0).sum(-1).max(initial=0))
    trace = dataclasses.replace(trace, attended=trace.attended[..., :widest])
    if batched:
        return trace
    shown = _first_row(dataclasses.replace(trace, prompt=None, last=None))
    return dataclasses.replace(shown, prompt=trace.prompt, last=trace.last)


@functools.partial(jax.jit, static_argnames=("policy", "rope_config"))
def _run(policy: Any, arrays: dict[str, Array], lengths: Array, rope_config: RopeConfig) -> Trace:
    tokens, dim = arrays["v"].shape[2:]
    room = tokens + arrays["dec_v"].shape[1] + getattr(policy, "n_local", 0)  # of positions, also in InfLLM's windows
    cos, sin = rope.cos_sin(jnp.arange(room, dtype=jnp.int32)[None], rope_config, dim, room)
    trace = _RUNS[type(policy)](policy, arrays, lengths, Rotations(cos[0], sin[0]))
    return dataclasses.replace(trace, attended=common.compact(trace.attended, trace.attended >= 0))


@jax.jit
def _first_row(trace: Trace) -> Trace:
    return jax.tree.map(lambda x: x[0], trace)


def _checked(policy: Any, case: Any) -> tuple[dict[str, AnyArray], bool]:
    """The arrays that the policy reads, with an axis B, and whether they had one."""
    if not isinstance(case, Mapping):
        raise bad_type("case", "must be a mapping of arrays by name", type(case).__name__, "Pass a dict.")
    needed = _INPUTS[type(policy)]
    if missing := sorted(set(needed) - set(case)):
        raise bad_value(
            "case", f"must hold {', '.join(needed)} for {type(policy).__name__}", sorted(case), f"Add {missing}."
        )
    arrays = {name: x if isinstance(x := case[name], jax.Array) else np.asarray(x) for name in needed}
    require_floats(**{f"case[{name!r}]": array for name, array in arrays.items()})
    batched = arrays["v"].ndim == 4
    sizes: dict[str, int] = {}
    for name, letters in needed.items():
        array = arrays[name]
        letters = "B" * batched + letters
        spelled = f"[{', '.join(letters.replace('S', 's'))}]".replace("s", "steps")
        require_shape(f"case[{name!r}]", array, tuple(sizes.get(x) if array.ndim else None for x in letters), spelled)
        sizes |= zip(letters, array.shape, strict=True)
    if empty := [letter for letter, size in sizes.items() if size == 0 and letter != "S"]:
        raise bad_value("case", "must not be empty", f"a size of 0 for {empty}", "Pass at least one token and head.")
    if sizes["D"] % 2:
        rule = "must have an even head dim, which RoPE turns in halves"
        raise bad_value("case", rule, sizes["D"], "Pad queries, keys and values.")
    if sizes["N"] % sizes["K"]:
        got = f"{sizes['N']} query heads and {sizes['K']} KV heads"
        raise bad_value("case", "must have a multiple of K query heads", got, "Change one of the two.")
    if isinstance(policy, ShadowKV) and policy.rank > sizes["K"] * sizes["D"]:
        most = sizes["K"] * sizes["D"]
        raise bad_value("ShadowKV.rank", f"must be at most K * D = {most}", policy.rank, f"Use rank={most} or less.")
    return (arrays if batched else {name: array[None] for name, array in arrays.items()}), batched


def _checked_lengths(lengths: Any, rows: int, tokens: int) -> AnyArray:
    if lengths is None:
        return np.full((rows,), tokens, np.int32)
    sizes = as_integers("lengths", lengths)
    require_shape("lengths", sizes, (rows,), "[B]")
    if is_concrete(sizes) and ((np.asarray(sizes) < 1) | (np.asarray(sizes) > tokens)).any():
        raise bad_value("lengths", f"must be in [1, T = {tokens}]", np.asarray(sizes).tolist(), "Change them.")
    return sizes


def _over_steps(decode: Any, prompt: Any, inputs: tuple[Array, ...], lengths: Array) -> tuple[Any, Any]:
    """Scans `decode(state, positions, *inputs of the step)`: (last state, what it gave, [B, steps, ...])."""
    positions = lengths + jnp.arange(inputs[0].shape[1], dtype=jnp.int32)[:, None]
    xs = (positions, *(jnp.moveaxis(x, 1, 0) for x in inputs))
    last, steps = jax.lax.scan(lambda state, x: decode(state, *x), prompt, xs)
    return last, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps)


def _run_layer(policy: Policy, a: dict[str, Array], lengths: Array, rotations: Rotations) -> Trace:
    """Of an engine of one layer, all of whose units are on the device."""
    batch, heads, tokens, dim = a["v"].shape
    new = a["dec_v"].shape[1]
    sizes = Sizes(1, batch, heads, dim, tokens, new, tokens + new)
    prompt = policy.read_prompt(a.get("k_pre"), a["k_post"], a["v"], a["q_last_post"], lengths, sizes)
    room = policy.num_units(sizes) - prompt.units.shape[2]  # units that only generated tokens fill
    units = jnp.pad(prompt.units, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0), (0, 0)))
    first = (jax.tree.map(lambda x: x[None], prompt.kept), units[None])

    def decode(state: Any, positions: Array, q: Array, k: Array, v: Array) -> tuple[Any, Any]:
        kept, pool = state
        step = policy.decode(kept, Store(pool, None, None), rotations, (q, k, v), positions, jnp.int32(0))
        return (step.kept, step.pool), step[2:]

    (last, _), steps = _over_steps(decode, first, (a["dec_q_post"], a["dec_k_post"], a["dec_v"]), lengths)
    out, ids, new_ids, _, scores, attended = steps
    if scores.shape[2] == 1:  # one selection for all heads
        ids, new_ids = ids[:, :, :1], new_ids[:, :, :1]
    return Trace(ids, new_ids, attended, out, scores, None, prompt.kept, jax.tree.map(lambda x: x[0], last))


def _run_infllm(policy: InfLLM, a: dict[str, Array], lengths: Array, rotations: Rotations) -> Trace:
    tokens, size = a["v"].shape[2], policy.exc
    pieces = -(-tokens // size)

    def cut(x: Array) -> Array:
        """The pieces of a prompt, [pieces, B, heads, exc, D]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pieces * size - tokens), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, size, x.shape[3]), 2, 0)

    counts = jnp.clip(lengths - jnp.arange(pieces, dtype=jnp.int32)[:, None] * size, 0, size)
    prompt = infllm.empty(policy, a["v"], a["q"].shape[1], room=tokens + a["dec_v"].shape[1])
    read = lambda state, x: infllm.read(policy, state, rotations, *x)
    prompt, of_pieces = jax.lax.scan(read, prompt, (cut(a["q"]), cut(a["k"]), cut(a["v"]), counts))
    prompt_out = jnp.moveaxis(of_pieces.out, 0, 2).reshape(*a["q"].shape[:2], pieces * size, -1)[:, :, :tokens]

    def decode(state: Any, positions: Array, q: Array, k: Array, v: Array) -> tuple[Any, Any]:
        count = jnp.ones_like(positions)
        return infllm.read(policy, state, rotations, q[:, :, None], k[:, :, None], v[:, :, None], count)

    last, steps = _over_steps(decode, prompt, (a["dec_q"], a["dec_k"], a["dec_v"]), lengths)
    lists = (steps.ids, steps.new_ids, steps.attended)
    return Trace(*lists, steps.out[:, :, :, 0], steps.scores, jnp.moveaxis(prompt_out, 1, 2), prompt, last)


_RUNS: dict[type, Any] = {ShadowKV: _run_layer, ArkVale: _run_layer, InfLLM: _run_infllm}
