"""The state of training and the pure function that advances it.

    optimizer = OptimizerConfig()
    state = init_state(model, optimizer)
    state, metrics = jit_train_step(state, tokens, optimizer=optimizer, steps=1000)

`jit_train_step` is `train_step` compiled; jit the plain function yourself where you want other options.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from nosa_jax.model import cast, forward
from nosa_jax.train.loss import next_token_loss
from nosa_jax.train.optim import OptimizerConfig, learning_rate_schedule, make_optimizer
from pallas_kernels.checks import bad_value
from pallas_kernels.promotion import usual_promotion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes, a pytree.

    model: NosaLM, float32 (the master copy).
    opt_state: of `make_optimizer`: two float32 moments per parameter and the step counts.
    step: int32 scalar, steps taken.
    """

    model: Any
    opt_state: Any
    step: Any


@usual_promotion
def init_state(model: Any, optimizer: OptimizerConfig) -> TrainState:
    """The state before the first step. The model is copied, in float32, as steps donate the state's buffers."""
    master = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), model)
    return TrainState(master, make_optimizer(optimizer, steps=1).init(master), jnp.zeros((), jnp.int32))


@usual_promotion
def batch_loss(
    model: Any, tokens: Integer[Array, "B W"], *, compute_dtype: Any = "float32", remat: bool = False
) -> Float[Array, ""]:
    """Mean next-token loss in nats of windows of W = T + 1 tokens; the forward pass runs in `compute_dtype`."""
    out = forward(cast(model, compute_dtype), tokens[:, :-1], remat=remat)
    return next_token_loss(out.logits, tokens[:, 1:])[0]


@usual_promotion
def train_step(
    state: TrainState,
    tokens: Integer[Array, "B W"],
    *,
    optimizer: OptimizerConfig,
    steps: int,
    compute_dtype: Any = "float32",
    accumulate: int = 1,
    remat: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of training on windows of W = T + 1 tokens. Pure; jit it with the state donated.

    state: the model, the optimizer's moments and the steps made.
    tokens: the batch.
    optimizer: its numbers and the shape of the learning rate.
    steps: of the whole run, the horizon of the learning rate.
    compute_dtype: of the forward and backward pass; parameters, moments and gradients stay float32.
    accumulate: split the batch into as many parts and average their gradients, to need less memory.
    remat: recompute each layer in the backward pass instead of keeping its activations, for the same reason.

    Returns the new state and float32 scalars: `loss` (nats, before the step), `grad_norm` (before clipping) and
    `learning_rate`. Raises ValueError when `accumulate` does not divide B.
    """
    if tokens.shape[0] % accumulate:
        raise bad_value("accumulate", f"must divide the batch size {tokens.shape[0]}", accumulate, "Change one.")
    loss_and_grad = jax.value_and_grad(partial(batch_loss, compute_dtype=compute_dtype, remat=remat))
    if accumulate == 1:
        loss, grads = loss_and_grad(state.model, tokens)
    else:
        parts = tokens.reshape(accumulate, -1, tokens.shape[1])
        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.model))
        add = lambda total, part: (jax.tree.map(jnp.add, total, loss_and_grad(state.model, part)), None)
        total, _ = jax.lax.scan(add, zeros, parts)
        loss, grads = jax.tree.map(lambda leaf: leaf / accumulate, total)

    updates, opt_state = make_optimizer(optimizer, steps).update(grads, state.opt_state, state.model)
    metrics = {
        "loss": loss,
        "grad_norm": jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))),
        "learning_rate": learning_rate_schedule(optimizer, steps)(state.step),
    }
    return TrainState(optax.apply_updates(state.model, updates), opt_state, state.step + 1), metrics


jit_train_step = jax.jit(
    train_step,
    static_argnames=("optimizer", "steps", "compute_dtype", "accumulate", "remat"),
    donate_argnames="state",
)
"""`train_step` compiled, its options static and the state donated: the one passed in is gone, use the one returned."""
