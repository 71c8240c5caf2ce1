"""Gives a pair of (forward, backward) functions JAX's reverse mode; the selection takes no gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import blocks
from pallas_kernels.promotion import usual_promotion


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """f(settings, q, k, v, bias, block_ids, positions, first_block) with gradients for q, k, v and bias.

    forward gives (out, lse, saved), backward takes the arguments, out and saved, and the gradients of out and lse.
    positions: None where query t is token t of its row; `forward` and `backward` always get the numbers.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(settings, q, k, v, bias, block_ids, positions, first_block):
        return forward(settings, q, k, v, bias, block_ids, positions, first_block)[:2]

    def attend_forward(settings, *args):
        out, lse, saved = forward(settings, *args)
        return (out, lse), (*args, out, saved)

    @usual_promotion
    def attend_backward(settings, residuals, grads):
        return (*backward(settings, residuals, grads), None, None, None)

    attend.defvjp(attend_forward, attend_backward)

    def call(settings, q, k, v, bias, block_ids, positions, first_block):
        if positions is None:
            positions = blocks.whole_rows(*q.shape[:2])
        return attend(settings, q, k, v, bias, block_ids, positions, first_block)

    return call
