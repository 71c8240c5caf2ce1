"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers, as_layer, require_count, require_dtype
from pallas_kernels._dispatch import register
from pallas_kernels.append_token import triton, xla
from pallas_kernels.append_token.summaries import Summaries
from pallas_kernels.blocks import MAX_STRIDE
from pallas_kernels.checks import bad_value, require_given, require_shape, require_size, require_type
from pallas_kernels.promotion import usual_promotion

APPEND_TOKEN = register(
    "append_token", {"xla": xla.append_token, "triton": triton.append_token}, {"triton": triton.unsupported}
)


def append_token(
    qkv: Float[ArrayLike, "B K G_plus_2 D"],
    cos: Float[ArrayLike, "B half"],
    sin: Float[ArrayLike, "B half"],
    scale: Float[ArrayLike, "L K"] | None,
    delta: Float[ArrayLike, "L K D heads"] | None,
    summaries: Summaries,
    positions: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    *,
    stride: int,
    implementation: str = "auto",
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"], Summaries]:
    """Returns the token's queries and key, rotated, its value, and the summaries with it.

    qkv: of each KV head its G query heads, its key and its value, before rotation; what comes back has its dtype.
    cos, sin: float32, of the rows' positions.
    scale, delta: float32 weights A [L, K] and delta [L, K, D, K] of the importance A * softplus(v delta); None where
        the summaries have none.
    summaries: of all layers.
    positions: of the token, which is how many came before it; -1 for rows without one.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    stride: of the pooling windows, in tokens, at most 1024.

    Raises ValueError or TypeError for arguments that do not go together.
    """
    stride = require_size("stride", stride, 1, maximum=MAX_STRIDE)
    checked = checked_token(qkv, cos, sin, scale, delta, summaries, positions, layer)
    with jax.named_scope("append_token"):
        return APPEND_TOKEN(implementation, *checked, stride=stride)


def checked_token(
    qkv: Any, cos: Any, sin: Any, scale: Any, delta: Any, summaries: Any, positions: Any, layer: Any,
    owners: tuple[str, str] = ("", ""),
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `append_token` as JAX arrays that go together.

    owners: what messages put before the names of the token's arrays, and of what is kept of all tokens.
    """
    token, kept = owners
    require_given(**{f"{token}qkv": qkv, f"{token}cos": cos, f"{token}sin": sin}, positions=positions, layer=layer)
    qkv, cos, sin = as_floats(**{f"{token}qkv": qkv, f"{token}cos": cos, f"{token}sin": sin})
    scale, delta = as_floats(**{f"{kept}scale": scale, f"{kept}delta": delta})
    (positions,) = as_integers(positions=positions)
    summaries = _as_summaries(summaries, f"{kept}summaries")
    require_shape(f"{token}qkv", qkv, (None,) * 4, "[B, K, G + 2, D]")
    batch, kv_heads, members, dim = qkv.shape
    if members < 3:
        rule = "must hold at least one query head, the key and the value of each KV head"
        raise bad_value(f"{token}qkv", rule, f"{members} of each", "Check its third axis.")
    require_shape(f"{token}cos", cos, (batch, dim // 2), "[B, D / 2]")
    require_shape(f"{token}sin", sin, cos.shape, "[B, D / 2]")
    require_shape("positions", positions, (batch,), "[B]")
    _check_importance(scale, delta, summaries, kv_heads, dim, kept)
    layer = as_layer(layer, _check_summaries(summaries, batch, kv_heads, dim, f"{kept}summaries"))
    return qkv, cos, sin, scale, delta, summaries, positions, layer


@usual_promotion
def append_summaries(
    summaries: Summaries,
    keys: Float[ArrayLike, "B K n D"],
    importance: Float[ArrayLike, "B K n"] | None,
    start: Integer[ArrayLike, " B"],
    count: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    *,
    stride: int,
) -> Summaries:
    """The summaries with any number of tokens: the first `count[b]` of a row follow `start[b]` others.

    summaries: of all layers; those of `layer` change.
    keys: of the tokens, after rotation.
    importance: of the tokens, None where the summaries have none.
    start: tokens that each row has already.
    count: how many of the n follow; 0 for a row that stays as it is.
    layer: which of the L layers.
    stride: tokens from one window to the next.
    Errors as in `append_token`.
    """
    require_given(keys=keys, start=start, count=count)
    stride = require_size("stride", stride, 1, maximum=MAX_STRIDE)
    keys, importance = as_floats(keys=keys, importance=importance)
    start, count = as_integers(start=start, count=count)
    summaries = _as_summaries(summaries)
    require_shape("keys", keys, (None,) * 4, "[B, K, n, D]")
    batch, kv_heads, new, dim = keys.shape
    require_shape("start", start, (batch,), "[B]")
    require_shape("count", count, (batch,), "[B]")
    require_count(count, new)
    if (importance is None) != (summaries.importance is None):
        rule = "must be given exactly where the summaries have importance"
        raise bad_value("importance", rule, None if importance is None else importance.shape, "Pass both or neither.")
    if (summaries.importance is None) != (summaries.pooled_importance is None):
        rule = "must hold importance and pooled_importance, or neither"
        raise bad_value("summaries", rule, "one of them", "Pass both or neither.")
    if importance is not None:
        require_shape("importance", importance, (batch, kv_heads, new), "[B, K, n]")
    layer = as_layer(layer, _check_summaries(summaries, batch, kv_heads, dim))
    with jax.named_scope("append_summaries"):
        return xla.append_summaries(summaries, keys, importance, start, count, layer, stride=stride)


def _as_summaries(summaries: Summaries, name: str = "summaries") -> Summaries:
    require_type(name, summaries, Summaries, "Pass pallas_kernels.Summaries(...).")
    leaves, structure = jax.tree.flatten_with_path(summaries)
    named = {f"{name}{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    return jax.tree.unflatten(structure, as_floats(**named))


def _check_importance(
    scale: Array | None, delta: Array | None, summaries: Summaries, kv_heads: int, dim: int, kept: str = ""
) -> None:
    """All parts of the importance, or none."""
    _, importance, pooled = summaries
    parts = {"scale": scale, "delta": delta, "summaries.importance": importance, "summaries.pooled_importance": pooled}
    parts = {f"{kept}{name}": part for name, part in parts.items()}
    missing = [name for name, x in parts.items() if x is None]
    if 0 < len(missing) < len(parts):
        raise bad_value(missing[0], f"must be given with {', '.join(parts)}, or none of them", None, "Pass all four.")
    if importance is not None:
        layers = importance.shape[0]
        require_shape(f"{kept}scale", scale, (layers, kv_heads), "[L, K]")
        require_shape(f"{kept}delta", delta, (layers, kv_heads, dim, kv_heads), "[L, K, D, K]")


def _check_summaries(summaries: Summaries, batch: int, kv_heads: int, dim: int, name: str = "summaries") -> int | None:
    """Raises where they differ in layers, batch or heads. Returns the number of layers, None without summaries."""
    keys, importance, pooled = summaries
    leaves = jax.tree.leaves(summaries)
    lead = (leaves[0].shape[0] if leaves else None, batch, kv_heads)
    for part, cache, width in (("pooled_keys", keys, dim), ("pooled_importance", pooled, 1)):
        if cache is not None:
            means, sums = cache
            require_shape(f"{name}.{part}[0]", means, (*lead, None, width), "[L, B, K, C, D]")
            require_shape(f"{name}.{part}[1]", sums, (*lead, 2, width), "[L, B, K, 2, D]")
            require_dtype(f"{name}.{part}[1]", sums, "float32", "as running sums are")
    if importance is not None:
        require_shape(f"{name}.importance", importance, (*lead, None, None), "[L, B, K, M, P]")
    return lead[0]
