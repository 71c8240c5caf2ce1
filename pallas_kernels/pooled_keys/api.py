"""Public functions of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_integers, as_layer, require_count, require_dtype
from pallas_kernels._dispatch import register
from pallas_kernels.blocks import MAX_STRIDE
from pallas_kernels.checks import require_given, require_shape, require_size
from pallas_kernels.pooled_keys import xla

POOL_KEYS = register("pool_keys", {"xla": xla.pool_keys})
APPEND_POOLED_KEYS = register("append_pooled_keys", {"xla": xla.append_pooled_keys})


def pool_keys(
    keys: Float[ArrayLike, "B K S D"], *, stride: int, implementation: str = "auto"
) -> Float[Array, "B K C D"]:
    """Mean of every complete window of 2 * stride keys, stride apart (paper section 3.2, compressed keys).

    keys: after RoPE, any float dtype. Returns C = max(0, S // stride - 1) windows, averaged in float32 and rounded once
    to the dtype of `keys`.
    """
    require_given(keys=keys)
    (keys,) = as_floats(keys=keys)
    require_shape("keys", keys, (None,) * 4, "[B, K, S, D]")
    stride = require_size("stride", stride, 1, maximum=MAX_STRIDE)
    with jax.named_scope("pool_keys"):
        return POOL_KEYS(implementation, keys, stride=stride)


def append_pooled_keys(
    pooled: Float[ArrayLike, "L B K C D"],
    sums: Float[ArrayLike, "L B K 2 D"],
    new: Float[ArrayLike, "B K n D"],
    start: Integer[ArrayLike, " B"],
    count: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    *,
    stride: int,
    implementation: str = "auto",
) -> tuple[Float[Array, "L B K C D"], Float[Array, "L B K 2 D"]]:
    """Adds tokens to the running pooled keys of one layer; appending in any split gives the bits of `pool_keys`.

    pooled: the windows so far.
    sums: float32, sum of the last complete stride and of the open one.
    new: the tokens' keys; those from `count[b]` on are ignored.
    start: how many tokens of each row came before.
    count: how many of the new ones each row takes.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    stride: of the windows, in tokens, at most 1024: its tokens are added one by one.

    Returns the updated (pooled, sums); windows beyond C are dropped. Raises ValueError or TypeError for
    arguments that do not go together.
    """
    require_given(pooled=pooled, sums=sums, new=new, start=start, count=count, layer=layer)
    pooled, sums, new = as_floats(pooled=pooled, sums=sums, new=new)
    start, count = as_integers(start=start, count=count)
    stride = require_size("stride", stride, 1, maximum=MAX_STRIDE)
    require_shape("pooled", pooled, (None,) * 5, "[L, B, K, C, D]")
    layers, batch, heads, _, dim = pooled.shape
    require_shape("sums", sums, (layers, batch, heads, 2, dim), "[L, B, K, 2, D]")
    require_shape("start", start, (batch,), "[B]")
    require_shape("count", count, (batch,), "[B]")
    require_shape("new", new, (batch, heads, None, dim), "[B, K, n, D]")
    require_count(count, new.shape[2])
    require_dtype("sums", sums, "float32", "as running sums are")
    layer = as_layer(layer, pooled.shape[0])
    with jax.named_scope("append_pooled_keys"):
        return APPEND_POOLED_KEYS(implementation, pooled, sums, new, start, count, layer, stride=stride)
