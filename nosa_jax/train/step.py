"""The state of training and the pure function that advances it.

    optimizer = OptimizerConfig()
    state = init_state(model, optimizer)
    state, metrics = jit_train_step(state, tokens, optimizer=optimizer, steps=1000)

`jit_train_step` is `train_step` compiled; jit the plain function yourself where you want other options. Where the state
lies on a mesh (`parallel.shard`), so does everything here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from nosa_jax import parallel
from nosa_jax.convert import cast
from nosa_jax.model import Remat, hidden_states
from nosa_jax.train.accumulate import accumulate as in_parts
from nosa_jax.train.data import Batch
from nosa_jax.train.finite import Skipped, keep_if_finite
from nosa_jax.train.loss import LossParts, chunked_loss
from nosa_jax.train.metrics import global_norm, norms_by_group
from nosa_jax.train.optim import OptimizerConfig, as_optimizer, learning_rate_schedule
from nosa_jax.train.patterns import merge, split
from pallas_kernels.checks import require_shape
from pallas_kernels.promotion import usual_promotion
from pallas_kernels.varying import alike, axes_of

# From a model in the dtype of computation and a batch to what is minimised: a float32 scalar, or one and LossParts.
Loss = Callable[[Any, Batch], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes, a pytree.

    model: NosaLM, float32 (the master copy).
    opt_state: of `make_optimizer`, for what trains: two moments per parameter and the step counts.
    step: int32 scalar, steps taken, skipped ones too.
    skipped: how many of them changed nothing, as their loss or gradient was not finite.
    """

    model: Any
    opt_state: Any
    step: Any
    skipped: Skipped = dataclasses.field(default_factory=Skipped.none)


@usual_promotion
def init_state(model: Any, optimizer: Any, trainable: str | Sequence[str] = ("*",)) -> TrainState:
    """The state before the first step. The model is copied, in float32, as steps donate the state's buffers.

    model: a NosaLM. One of shapes, `jax.ShapeDtypeStruct`s that have a sharding, gives a state of such, which lie where
        arrays would.
    optimizer: an OptimizerConfig or an optax transformation.
    trainable: patterns of the parameters that get moments, see `split`.

    Raises ValueError for a pattern that matches no parameter.
    """
    transformation = as_optimizer(optimizer, 1)

    def init(model: Any) -> TrainState:
        master = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), model)
        return TrainState(master, transformation.init(split(master, trainable)[0]), jnp.zeros((), jnp.int32))

    mesh, first = parallel.concrete_mesh(model), jax.tree.leaves(model)[0]
    of_shapes = isinstance(first, jax.ShapeDtypeStruct)
    if mesh is None and not of_shapes:
        return init(model)
    shapes = jax.eval_shape(init, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model))
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first.sharding), shapes)
    if of_shapes:
        return parallel.shard(shapes, mesh)
    return jax.jit(init, out_shardings=parallel.shardings(shapes, mesh))(model)


def as_batch(tokens: Batch | Integer[Array, "B W"]) -> Batch:
    """A Batch as it is; windows of W = T + 1 tokens as inputs and the targets after them."""
    return tokens if isinstance(tokens, Batch) else Batch(tokens[:, :-1], tokens[:, 1:])


@usual_promotion
def token_loss(
    model: Any, batch: Batch, *, chunk: int | None = None, z_loss: float = 0.0, remat: Remat = False
) -> tuple[Float[Array, ""], LossParts]:
    """Mean next-token loss in nats of a batch, and the sums that it is made of, by position.

    model: computes in the dtype of its parameters.
    batch: rows of tokens; see `Batch`.
    chunk, z_loss: see `chunked_loss`. Each device makes the logits of its own rows, positions and part of the
        vocabulary, `chunk` positions at a time.
    remat: see `forward`.
    """
    require_shape("batch.tokens", batch.tokens, (None, None), "[B, T]")
    for name in ("targets", "mask", "segment_ids"):
        if getattr(batch, name) is not None:
            require_shape(f"batch.{name}", getattr(batch, name), batch.tokens.shape, "[B, T]")

    def of_device(head: Any, hidden: Any, targets: Any, mask: Any) -> LossParts:
        cut = "tensor" if "tensor" in axes_of(head) else None
        head, hidden = alike((head, hidden))  # once: gradients are then summed over devices once, not chunk by chunk
        logits = partial(model.logits_by, head)
        parts = chunked_loss(logits, hidden, targets, mask, chunk=chunk, z_loss=z_loss, vocab_axis=cut)[1]
        return jax.tree.map(lambda x: x[None], parts)

    def body(model: Any, batch: Batch) -> tuple[Any, LossParts]:
        hidden, _ = hidden_states(model, batch.tokens, None, batch.segment_ids, remat=remat)
        targets, mask = (x if x is None else parallel.in_query_order(x, 1) for x in (batch.targets, batch.mask))
        parts = parallel.per_row_and_head(
            of_device,
            (model.head(), hidden, targets, mask),
            (".." if model.lm_head is None else ".v", "bt.", "bt", "bt"),
            LossParts("bt", "bt", "bt"),
        )
        parts = jax.tree.map(lambda x: parallel.in_row_order(x.sum(0, dtype=x.dtype), 0), parts)
        return parts.loss(z_loss), parts

    out = PartitionSpec(), LossParts(*(PartitionSpec(),) * 3)
    return parallel.run(parallel.mesh_of(model, batch), body, model, batch, out=out)


@usual_promotion
def batch_loss(
    model: Any,
    tokens: Batch | Integer[Array, "B W"],
    *,
    compute_dtype: Any = "float32",
    remat: Remat = False,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Mean next-token loss in nats of a Batch, or of windows of W = T + 1 tokens, computed in `compute_dtype`."""
    return token_loss(cast(model, compute_dtype), as_batch(tokens), chunk=chunk, remat=remat)[0]


@usual_promotion
def train_step(
    state: TrainState,
    tokens: Batch | Integer[Array, "B W"],
    *,
    optimizer: Any,
    steps: int,
    compute_dtype: Any = "float32",
    accumulate: int = 1,
    remat: Remat = False,
    trainable: str | tuple[str, ...] = ("*",),
    loss: Loss | None = None,
    loss_chunk: int | None = None,
    z_loss: float = 0.0,
    watch: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of training. Pure; jit it with the state donated.

    state: the model, the optimizer's moments and the steps made.
    tokens: a Batch, or windows of W = T + 1 tokens.
    optimizer: an OptimizerConfig, or an optax transformation.
    steps: of the whole run, the horizon of the learning rate.
    compute_dtype: of the forward and backward pass; parameters, moments and sums of gradients stay float32.
    accumulate: split the batch into as many parts and average their gradients over targets, to need less memory.
    remat: what the backward pass makes again instead of keeping it, for the same reason; see `forward`.
    trainable: patterns of the parameters that train; the others get no gradients. As given to `init_state`.
    loss: what is minimised instead of `token_loss`: a function of the model, in `compute_dtype`, and the Batch. Returns
        a scalar, the mean over rows, or a scalar and LossParts, the mean over what these count.
    loss_chunk, z_loss: see `chunked_loss`.
    watch: whether `metrics` has the norms of gradients and parameters by group and the steps skipped, too.

    A step whose loss or gradient is not finite changes nothing but the counts. Returns the new state and float32
    scalars: `loss` (nats, before the step), `grad_norm` (before clipping), `learning_rate` where `optimizer` is an
    OptimizerConfig, and with `watch` `grad_norm_<group>` and `param_norm_<group>` (see `norms_by_group`), `skipped` and
    `skipped_in_a_row`. Raises ValueError when `accumulate` does not divide B.
    """
    transformation = as_optimizer(optimizer, steps)
    of_batch = partial(token_loss, chunk=loss_chunk, z_loss=z_loss, remat=remat) if loss is None else _with_parts(loss)

    def body(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        part, frozen = split(state.model, trainable)

        def of_part(part: Any, batch: Batch) -> tuple[Any, LossParts]:
            value, parts = of_batch(cast(merge(part, frozen), compute_dtype), batch)
            return value.astype(jnp.float32), parts

        def loss_and_grad(batch: Batch) -> Any:
            value, grads = jax.value_and_grad(of_part, has_aux=True)(part, batch)
            return value, parallel.as_lying(grads)

        (value, parts), grads = in_parts(loss_and_grad, batch, accumulate)
        updates, opt_state = transformation.update(grads, state.opt_state, part)
        norm = global_norm(grads)
        new = optax.apply_updates(part, updates), opt_state
        (part, opt_state), skipped, _ = keep_if_finite(state.skipped, (part, state.opt_state), new, value, norm)
        metrics = {"loss": parts.cross_entropy(), "grad_norm": norm}
        if watch:
            metrics |= {"skipped": skipped.total, "skipped_in_a_row": skipped.in_a_row}
            metrics |= {f"grad_norm_{group}": value for group, value in norms_by_group(grads).items()}
            metrics |= {f"param_norm_{group}": value for group, value in norms_by_group(state.model).items()}
        if isinstance(optimizer, OptimizerConfig):
            taken = state.step - state.skipped.total
            metrics["learning_rate"] = learning_rate_schedule(optimizer, steps)(taken)
        changed = TrainState(merge(part, frozen), opt_state, state.step + 1, skipped)
        return parallel.as_lying(changed), metrics

    batch = as_batch(tokens)
    mesh = parallel.mesh_of(state, batch)
    out = None if mesh is None else (parallel.specs(state, mesh), PartitionSpec())
    return parallel.run(mesh, body, state, batch, out=out)


def _with_parts(loss: Loss) -> Callable[[Any, Batch], tuple[Any, LossParts]]:
    """A user's loss with parts; where it has none, every batch counts as one target."""

    def call(model: Any, batch: Batch) -> tuple[Any, LossParts]:
        found = loss(model, batch)
        if isinstance(found, tuple):
            return found
        one = jnp.asarray(found, jnp.float32)[None]
        return found, LossParts(one, jnp.zeros_like(one), jnp.ones((1,), jnp.int32))

    return call


jit_train_step = jax.jit(
    train_step,
    static_argnames=(
        *("optimizer", "steps", "compute_dtype", "accumulate", "remat", "trainable", "loss", "loss_chunk", "z_loss"),
        "watch",
    ),
    donate_argnames="state",
)
"""`train_step` compiled, its options static and the state donated: the one passed in is gone, use the one returned."""
