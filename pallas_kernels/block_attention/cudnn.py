"""Dense causal attention of whole rows by cuDNN, the vendor's fused kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_attention import vjp, xla
from pallas_kernels.block_attention.xla import Settings

_log_sum_exp = vjp.differentiable(xla.forward, xla.backward)


def unsupported(
    settings: Settings, q: Array, k: Array, v: Array, bias: Array | None, block_ids: Array | None,
    positions: Array | None, first_block: Array | None,
) -> str | None:  # fmt: skip
    """Why cuDNN cannot take these arguments; None where it can."""
    given = {"block_ids": block_ids, "bias": bias, "first_block": first_block, "positions": positions}
    for name, x in given.items():
        if x is not None:
            return f"it knows only the causal mask of whole rows, {name} must be None"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if not (q.dtype == k.dtype == v.dtype):
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dim must be a multiple of 8 up to 128, got {q.shape[-1]}"
    return None


def attend(
    settings: Settings,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bias: Float[Array, "B K S"] | None,
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"] | None,
    first_block: Int32[Array, "B M"] | None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """The output and its gradients are cuDNN's, lse and its gradients XLA's.

    JAX hands out the log-sum-exp of cuDNN rounded to the dtype of q, and drops its gradient without a word. Under
    `jax.jit` nothing is left of the half that the caller does not use.
    """
    keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    out = jax.nn.dot_product_attention(q, keys, values, scale=settings.scale, is_causal=True, implementation="cudnn")
    return out, _log_sum_exp(settings, q, k, v, bias, block_ids, positions, first_block)[1]
