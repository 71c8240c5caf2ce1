"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import math

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from pallas_kernels._arguments import as_floats, as_layer
from pallas_kernels._dispatch import register
from pallas_kernels.checks import require_given, require_number, require_shape
from pallas_kernels.rms_norm import triton, xla

RMS_NORM = register("rms_norm", {"xla": xla.rms_norm, "triton": triton.rms_norm}, {"triton": triton.unsupported})


def rms_norm(
    x: Float[ArrayLike, "B H"],
    weight: Float[ArrayLike, "L H"],
    layer: Integer[ArrayLike, ""],
    *,
    eps: float,
    implementation: str = "auto",
) -> Float[Array, "B H"]:
    """x / sqrt(mean(x**2) + eps) * weight[layer], in the dtype of `x`.

    x: what is normalised, along its last axis.
    weight: of all layers.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    eps: added to the mean square.

    For decode steps: kernels have no derivative (`nosa_jax.forward` has them, by the formula on slices).
    Raises ValueError or TypeError for arguments that do not go together.
    """
    require_given(x=x, weight=weight, layer=layer)
    x, weight = as_floats(x=x, weight=weight)
    require_shape("x", x, (None, None), "[B, H]")
    require_shape("weight", weight, (None, x.shape[1]), "[L, H]")
    layer, eps = as_layer(layer, weight.shape[0]), float(require_number("eps", eps, 0.0, math.inf))
    with jax.named_scope("rms_norm"):
        return RMS_NORM(implementation, x, weight, layer, eps=eps)
