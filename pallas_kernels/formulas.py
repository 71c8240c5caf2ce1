"""The formulas that the model and the kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def dot(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum summed in float32: float32 operands in full precision, 16-bit ones as they are, whose products fit."""
    return jnp.einsum(spec, x, y, precision="highest", preferred_element_type=jnp.float32)


def rotate(
    x: Float[Array, "*rows h D"], cos: Float[Array, "*rows half"], sin: Float[Array, "*rows half"]
) -> Float[Array, "*rows h D"]:
    """Rotates dimension i with i + D/2 (`rotate_half` of RoPE), in float32, back in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rms_norm(x: Float[Array, "*rest H"], weight: Float[Array, " H"], eps: float) -> Float[Array, "*rest H"]:
    """x / rms(x) * weight in float32, back in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def importance_of(
    v: Float[Array, "*rows K D"], scale: Float[Array, " K"], delta: Float[Array, "*KD heads"]
) -> Float[Array, "*rows K"]:
    """A * softplus(v delta) of every token in float32 (paper section 3.3), A being `scale`.

    delta: maps the values of all K heads to one number per head, so its last axis is K long too.
    """
    flat = v.astype(jnp.float32).reshape(*v.shape[:-2], -1)
    weights = delta.reshape(-1, delta.shape[-1])
    return scale * jax.nn.softplus(jnp.matmul(flat, weights, precision="highest"))


def weight_shift(tokens: int, dtype: DTypeLike) -> int:
    """By how many binary orders softmax's weights are made smaller before `tokens` values are summed.

    So a sum of values near the largest of their dtype stays finite where their average is. None for float16, whose
    values are far from the largest float32, in which they are summed, and whose weights have few exponents.
    """
    return 0 if dtype == jnp.float16 else tokens.bit_length()
