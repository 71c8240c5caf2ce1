"""What a step is put together from, put together: it is the step at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import but_slow, lively_model, random_tokens, small_config

from nosa_jax._pytree import by_name
from nosa_jax.convert import cast
from nosa_jax.model import forward
from nosa_jax.train import (
    OptimizerConfig,
    Skipped,
    accumulate,
    as_optimizer,
    chunked_loss,
    global_norm,
    init_state,
    keep_if_finite,
    merge,
    split,
    train_step,
)

TOKENS = random_tokens(2, 34)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, clip_norm=0.1)


@partial(jax.jit, static_argnames=("patterns", "parts", "compute_dtype"))
def step_of_parts(model, opt_state, skipped, tokens, *, patterns, parts, compute_dtype="float32"):
    trainable, frozen = split(model, patterns)

    def loss(trainable, tokens):
        whole = cast(merge(trainable, frozen), compute_dtype)
        hidden = forward(whole, tokens[:, :-1], logits="none").hidden
        return chunked_loss(whole.logits, hidden, tokens[:, 1:], chunk=10)

    (value, _), grads = accumulate(partial(jax.value_and_grad(loss, has_aux=True), trainable), tokens, parts)
    updates, new_state = as_optimizer(OPTIMIZER, 10).update(grads, opt_state, trainable)
    new = optax.apply_updates(trainable, updates), new_state
    (trainable, opt_state), skipped, _ = keep_if_finite(skipped, (trainable, opt_state), new, value, global_norm(grads))
    return merge(trainable, frozen), opt_state, skipped, value


@pytest.mark.slow
@pytest.mark.parametrize("x64", but_slow([False, True], True))
def test_a_step_of_parts_is_the_step_at_once(x64):
    """Also where 64 bits are allowed: every array keeps its dtype."""
    start = lively_model(small_config())
    state, metrics = jax.jit(partial(train_step, optimizer=OPTIMIZER, steps=10))(init_state(start, OPTIMIZER), TOKENS)
    opt_state = as_optimizer(OPTIMIZER, 10).init(start)
    with jax.enable_x64(x64):
        model, opt_state, skipped, loss = step_of_parts(
            start, opt_state, Skipped.none(), TOKENS, patterns="everything", parts=2
        )
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
    assert skipped.total == 0
    # Adam's first step is the sign of the gradient: compare the gradients behind it, its first moment.
    for a, b in zip(jax.tree.leaves(opt_state[1].mu), jax.tree.leaves(state.opt_state[1].mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert {leaf.dtype for leaf in jax.tree.leaves((model, opt_state[1].mu, loss))} == {jnp.dtype("float32")}
    assert opt_state[1].count.dtype == skipped.total.dtype == jnp.int32


@pytest.mark.slow
def test_only_what_trains_changes():
    """Importance alone, in bfloat16: the rest keeps its bits, and importance goes where its own gradient says."""
    start = lively_model(small_config())
    trainable, _ = split(start, "importance")
    opt_state = as_optimizer(OPTIMIZER, 10).init(trainable)
    model, opt_state, _, _ = step_of_parts(
        start, opt_state, Skipped.none(), TOKENS, patterns="importance", parts=1, compute_dtype="bfloat16"
    )
    before, after = by_name(start), by_name(model)
    assert {name for name in before if (before[name] != after[name]).any()} == set(by_name(trainable))
    assert set(by_name(opt_state[1].mu)) == set(by_name(trainable))
