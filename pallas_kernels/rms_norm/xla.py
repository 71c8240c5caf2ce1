"""The formula with a slice of the weights."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import formulas


def rms_norm(
    x: Float[Array, "B H"], weight: Float[Array, "L H"], layer: Int32[Array, ""], *, eps: float
) -> Float[Array, "B H"]:
    return formulas.rms_norm(x, weight[layer], eps)
