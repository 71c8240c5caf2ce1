"""Block attention against its definition, for every implementation: inputs, truths, and how close is close."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_attention
from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention.cases import SMALL, make_inputs, options

EPS = float(jnp.finfo(jnp.float32).eps)
LEARNED = ("q", "k", "v", "bias")


@functools.partial(jax.jit, static_argnames=("block_size", "scale"))
def definition(inputs, *, block_size, scale=None):
    return reference.block_attention_ref(**inputs, block_size=block_size, scale=scale)


def triton(**arguments):
    """Only ever called where a kernel can run: compiled functions of it are never shared with another machine's."""
    return block_attention(**arguments, implementation="triton")


def in_dtype(inputs, dtype):
    return inputs | {name: inputs[name].astype(dtype) for name in ("q", "k", "v")}


def bits(outputs):
    return jax.tree.map(np.asarray, outputs)


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, bits(ours), bits(theirs))


def assert_values_close(ours, theirs):
    """(out, lse) in float32: logits of a few units carry a few roundings each, and so do the weights."""
    (out, lse), (true_out, true_lse) = bits(ours), bits(theirs)
    np.testing.assert_allclose(out, true_out, rtol=0, atol=16 * EPS * np.abs(true_out).max())
    assert_lse_close(lse, true_lse)


def assert_lse_close(lse, true_lse, tolerance=8 * EPS):
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(true_lse))
    seen = np.isfinite(true_lse)
    np.testing.assert_allclose(lse[seen], true_lse[seen], rtol=0, atol=tolerance * np.abs(true_lse[seen]).max())


def assert_close(ours, theirs, tolerance):
    for name, expected in theirs.items():
        scale = np.abs(expected).max()
        assert scale > 0.1, name
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)


# ---- the same maths in low precision ----


def rounded_weights(q, k, v, bias, block_ids, positions, first_block, *, block_size):
    """Weights and results are rounded to the inputs' dtype, as any fast kernel does; so are their gradients."""
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    mask = reference.token_mask(block_ids, positions, first_block, num_tokens=k.shape[2], block_size=block_size)
    mask = mask[:, :, :, None]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgd,bksd->bktgs", grouped, k) * dim**-0.5
    logits = logits if bias is None else logits + bias[:, :, None, None]
    logits = jnp.where(mask, logits, -1e30)
    weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0)
    out = jnp.einsum("bktgs,bksd->btkgd", weights.astype(dtype).astype(jnp.float32), v)
    lse = jnp.where(mask.any(-1), jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    return out.reshape(batch, length, heads, dim).astype(dtype), jnp.moveaxis(lse, 1, 2).reshape(batch, length, heads)


def assert_as_good(ours, naive, truth, dtype=jnp.bfloat16):
    """Twice the error of the same maths in low precision, on average and at worst, plus a rounding."""

    def error(x):
        difference = np.asarray(x, np.float64) - truth
        return np.sqrt(np.mean(difference**2)), np.abs(difference).max()

    floor = float(jnp.finfo(dtype).eps) * np.abs(truth).max() / 4
    for mine, allowed in zip(error(ours), error(naive), strict=True):
        assert mine <= 2 * allowed + floor


# ---- gradients ----


@functools.cache
def case_of(name: str):
    """(numpy inputs, weights of the outputs in the loss, static arguments)."""
    return of_case(SMALL[name])


def of_case(case):
    inputs = jax.tree.map(np.asarray, make_inputs(case, jax.random.key(3)))
    rng = np.random.default_rng(5)
    out = rng.standard_normal(inputs["q"].shape)
    lse = rng.standard_normal(inputs["q"].shape[:3])
    return inputs, (out, lse), options(case)


@functools.partial(jax.jit, static_argnames=("op", "block_size"))
def value_and_gradients(op, inputs, cotangents, *, block_size):
    """((out, lse), gradients of sum(out * cotangent) + sum(lse * cotangent) in q, k, v and bias)."""
    learned = {name: inputs[name] for name in LEARNED if inputs[name] is not None}
    outputs, pull = jax.vjp(lambda x: op(**(inputs | x), block_size=block_size), learned)
    grads = jax.tree.map(lambda g, o: jnp.asarray(g, o.dtype), cotangents, outputs)
    return outputs, pull(grads)[0]


def in_float64(op, inputs, cotangents, **size):
    with jax.enable_x64(True):
        wide = {
            name: np.asarray(x, np.float64) if name in LEARNED and x is not None else x for name, x in inputs.items()
        }
        return jax.device_get(value_and_gradients(op, wide, cotangents, **size))


def no_lse_of_empty(inputs, cotangents):
    """The lse of a query that sees nothing is -inf whatever the inputs: it takes no part in the loss."""
    out, lse = cotangents
    return out, np.where(inputs["positions"][..., None] >= 0, lse, 0)


def true_gradients(inputs, cotangents, **size):
    return in_float64(reference.block_attention_ref, inputs, no_lse_of_empty(inputs, cotangents), **size)


@functools.cache
def truth(name: str):
    inputs, cotangents, size = case_of(name)
    return true_gradients(inputs, cotangents, **size)


def in_bfloat16(inputs, cotangents):
    """(bfloat16 inputs and cotangents, the same numbers in float32)."""
    out, lse = cotangents
    low = in_dtype(inputs, jnp.bfloat16)
    wide = in_dtype(low, np.float32)
    return (low, (out.astype(jnp.bfloat16), lse)), (wide, (np.asarray(out.astype(jnp.bfloat16), np.float64), lse))


# ---- what all logits have in common ----

OFFSETS = [sign * size for size in (50, 500, 5000) for sign in (1, -1)]


def with_exact_products(inputs, offset=0.0, keys="k"):
    """Queries and keys whose products are multiples of 1/64 that float32 holds exactly, with about so much of a natural
    logit more in all of them."""
    q, k = (np.round(8 * np.asarray(inputs[name], np.float32)) / 8 for name in ("q", keys))
    size = 2.0 ** np.round(np.log2(abs(offset) * q.shape[-1] ** 0.5 / 16)) if offset else 0.0
    q[..., -1], k[..., -1] = 16.0, np.sign(offset) * size
    return inputs | {"q": q.astype(inputs["q"].dtype), keys: k.astype(inputs[keys].dtype)}


def error_sizes(ours, truth):
    difference = np.asarray(ours, np.float64) - truth
    return np.array([np.sqrt(np.mean(difference**2)), np.abs(difference).max()])


def assert_twice_as_far_at_most(ours, naive, truth, floor=4 * EPS):
    """From the truth, on average and at worst, than a softmax by natural exponentials; beside a few roundings."""
    allowed = 2 * error_sizes(naive, truth) + floor * np.abs(truth).max()
    assert (error_sizes(ours, truth) <= allowed).all(), (error_sizes(ours, truth), error_sizes(naive, truth))


# ---- what must not matter ----


def seen_tokens(inputs, **size):
    """[B, K, S]: whether any query of the row sees the token."""
    arrays = (None if inputs[n] is None else jnp.asarray(inputs[n]) for n in ("block_ids", "positions", "first_block"))
    mask = reference.token_mask(*arrays, num_tokens=inputs["k"].shape[2], **size)
    return np.broadcast_to(np.asarray(mask.any(2)), inputs["k"].shape[:3])  # without ids, all heads see the same


def fuzzed_ids(inputs, num_blocks, *, block_size):
    """The ids, with what selects nothing in their empty places: extremes, the future, blocks of another document."""
    ids, rng = inputs["block_ids"], np.random.default_rng(1)
    own = np.maximum(inputs["positions"], 0)[:, None, :, None] // block_size
    first = np.zeros_like(own)
    if inputs["first_block"] is not None:
        first = np.take_along_axis(inputs["first_block"][:, None, :, None], own, axis=2)
    kinds = [
        -(2**31), -(2**31) + 1, -num_blocks, -1, num_blocks, 32 * num_blocks, 2**26, 2**31 - 1,
        rng.integers(own + 1, np.maximum(num_blocks, own + 2), ids.shape),
        rng.integers(np.minimum(0, first - 1), np.maximum(first, 0), ids.shape),
    ]  # fmt: skip
    return np.where(ids < 0, np.choose(rng.integers(0, len(kinds), ids.shape), kinds), ids).astype(np.int32)


def poisoned(inputs, **size):
    """NaN in every token that nobody sees, and in every query that is padding."""
    seen, real = seen_tokens(inputs, **size), inputs["positions"] >= 0
    poison = {
        "q": np.where(real[..., None, None], inputs["q"], np.nan),
        "k": np.where(seen[..., None], inputs["k"], np.nan),
        "v": np.where(seen[..., None], inputs["v"], np.nan),
        "bias": None if inputs["bias"] is None else np.where(seen, inputs["bias"], np.nan),
    }
    return inputs | {name: x if x is None else x.astype(inputs[name].dtype) for name, x in poison.items()}
