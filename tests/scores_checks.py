"""Block scores against their definition, for every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_scores import reference
from pallas_kernels.block_scores.cases import SMALL, make_inputs

EPS = float(jnp.finfo(jnp.float32).eps)


@functools.partial(jax.jit, static_argnames=("num_blocks", "block_size", "stride"))
def definition(inputs, **options):
    return reference.block_scores_ref(**inputs, **options)


@functools.cache
def made(name: str):
    return make_inputs(SMALL[name], jax.random.key(1))


def inputs_of(name: str):
    return dict(made(name))  # a copy: a test that changes it must not change what the next one sees


def with_nan(inputs):
    """One head of a query holds NaN and one window of the last row a number that makes infinite logits."""
    q, pooled = np.array(inputs["q"]), np.array(inputs["pooled_keys"])
    q[0, q.shape[1] // 2, 0, 0] = np.nan
    pooled[-1, 0, 1, 0] = np.inf
    return inputs | {"q": jnp.asarray(q), "pooled_keys": jnp.asarray(pooled)}


def assert_close(ours, theirs):
    """Scores are sums of probabilities: each carries the few roundings of its logit. -inf and 0 have no error."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    for special in (0, -np.inf):
        np.testing.assert_array_equal(ours == special, theirs == special)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    real = theirs > 0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=32 * EPS, atol=1e-30)
