"""The loss, in chunks the same as at once, and gradients in parts."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nosa_jax.train import accumulate, bits_per_byte, chunked_loss, length_mask, next_token_loss
from nosa_jax.train.loss import CHUNK_LOGITS, _even_chunk

BATCH, LENGTH, HIDDEN, VOCAB = 4, 13, 6, 11
_RNG = np.random.default_rng(0)
HEAD = jnp.asarray(_RNG.normal(size=(HIDDEN, VOCAB)), jnp.float32)
STATES = jnp.asarray(_RNG.normal(size=(BATCH, LENGTH, HIDDEN)), jnp.float32)
TARGETS = jnp.asarray(_RNG.integers(0, VOCAB, (BATCH, LENGTH)))
MASK = jnp.asarray(_RNG.random((BATCH, LENGTH)) < 0.6)


def logits_of(head, hidden):
    return jnp.einsum("bth,hv->btv", hidden, head, preferred_element_type=jnp.float32)


def whole(head, hidden, mask=None, z_loss=0.0):
    logits = logits_of(head, hidden)
    loss, count = next_token_loss(logits, TARGETS, mask)
    squares = jnp.square(jax.nn.logsumexp(logits, -1))
    return loss + z_loss * jnp.where(True if mask is None else mask, squares, 0).sum() / jnp.maximum(count, 1)


@partial(jax.jit, static_argnames=("chunk", "z_loss"))
def in_chunks(head, hidden, mask=None, *, chunk=None, z_loss=0.0):
    loss = lambda head, hidden: chunked_loss(
        partial(logits_of, head), hidden, TARGETS, mask, chunk=chunk, z_loss=z_loss
    )
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(head, hidden)


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_loss_is_the_mean_negative_log_likelihood_of_unmasked_targets():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    targets = jnp.array([[0, 1, 2], [3, 4, 0]])
    by_hand = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1)[..., 0]
    loss, count = next_token_loss(logits, targets)
    np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-6)
    assert count == 6
    mask = length_mask(jnp.array([2, 3]), 3)
    np.testing.assert_array_equal(mask, [[True, False, False], [True, True, False]])
    poisoned = logits.at[0, 2].set(jnp.nan)
    loss, count = next_token_loss(poisoned, targets, mask)
    np.testing.assert_allclose(loss, by_hand[np.asarray(mask)].mean(), rtol=1e-6)
    assert count == 3
    gradient = jax.grad(lambda x: next_token_loss(x, targets, mask)[0])(logits)
    assert not gradient[0, 1:].any() and gradient[0, 0].any()
    assert next_token_loss(logits, targets, jnp.zeros((2, 3), bool))[0] == 0


def test_loss_is_float32_for_bfloat16_logits_and_uniform_logits_cost_eight_bits():
    loss, _ = next_token_loss(jnp.zeros((1, 2, 256), jnp.bfloat16), jnp.array([[3, 255]]))
    assert loss.dtype == jnp.float32
    assert bits_per_byte(float(loss)) == pytest.approx(8)
    assert bits_per_byte(float(loss), bytes_per_token=4.0) == pytest.approx(2)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("chunk, z_loss", [(1, 0.0), (5, 0.01), (LENGTH, 0.01), (None, 0.0)])
def test_chunks_change_neither_the_loss_nor_its_gradients(chunk, z_loss, mask):
    (loss, parts), grads = in_chunks(HEAD, STATES, mask, chunk=chunk, z_loss=z_loss)
    expected, expected_grads = jax.value_and_grad(whole, (0, 1))(HEAD, STATES, mask, z_loss)
    assert_close((loss, grads), (expected, expected_grads))
    assert loss.dtype == jnp.float32
    assert parts.count == (TARGETS.size if mask is None else mask.sum())
    np.testing.assert_allclose(parts.cross_entropy(), whole(HEAD, STATES, mask), rtol=1e-6)


@pytest.mark.parametrize("chunk", [5, None])
def test_a_vocabulary_in_parts_changes_neither_the_loss_nor_its_gradients(chunk):
    """As devices have them: vmap's named axis stands for that of a mesh."""
    width = 12  # a token more, which parts share and nobody predicts
    head = jnp.pad(HEAD, ((0, 0), (0, width - VOCAB)), constant_values=-9.0)

    def of_part(part, hidden):
        return chunked_loss(
            partial(logits_of, part), hidden, TARGETS, MASK, chunk=chunk, z_loss=0.01, vocab_axis="vocabulary"
        )[0]

    def in_parts(head, hidden):
        parts = jnp.stack(jnp.split(head, 3, axis=1))
        losses = jax.vmap(of_part, in_axes=(0, None), axis_name="vocabulary")(parts, hidden)
        return losses.mean()  # all have the loss of the whole vocabulary

    expected = jax.value_and_grad(lambda *args: whole(*args, MASK, 0.01), (0, 1))(head, STATES)
    assert_close(jax.value_and_grad(in_parts, (0, 1))(head, STATES), expected)


def test_sums_by_position_are_those_of_each_column():
    _, parts = chunked_loss(partial(logits_of, HEAD), STATES, TARGETS, MASK.at[:, 3].set(False), chunk=4)
    found = parts.nats / parts.counts
    for t in (0, 7, LENGTH - 1):
        column = next_token_loss(logits_of(HEAD, STATES)[:, t : t + 1], TARGETS[:, t : t + 1], MASK[:, t : t + 1])
        np.testing.assert_allclose(found[t], column[0], rtol=1e-6)
    assert parts.nats.shape == (LENGTH,) and jnp.isnan(found[3])


def test_what_does_not_count_may_hold_anything():
    """NaN in padding reaches neither the loss nor a gradient; with no target at all both are 0."""
    poisoned = jnp.where(MASK[..., None], STATES, jnp.nan)
    (loss, _), grads = in_chunks(HEAD, poisoned, MASK, chunk=5)
    assert_close((loss, grads), jax.value_and_grad(whole, (0, 1))(HEAD, STATES, MASK))
    (loss, parts), grads = in_chunks(HEAD, poisoned, jnp.zeros_like(MASK), chunk=5)
    assert loss == 0 == parts.count and not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_gradients_of_many_chunks_add_up_in_float32():
    """In bfloat16 the head's gradient is as near to the exact one as that of all positions at once."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(1, 512, 32)), jnp.bfloat16)
    head = jnp.asarray(0.1 * rng.normal(size=(32, 64)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 64, (1, 512)))
    loss = lambda head, hidden, chunk: chunked_loss(partial(logits_of, head), hidden, targets, chunk=chunk)[0]
    grad = jax.jit(jax.grad(loss), static_argnums=2)
    exact, once, many = (
        grad(head.astype(dtype), hidden.astype(dtype), chunk).astype(jnp.float32)
        for dtype, chunk in ((jnp.float32, 512), (jnp.bfloat16, 512), (jnp.bfloat16, 8))
    )
    error = lambda grad: jnp.linalg.norm(grad - exact) / jnp.linalg.norm(exact)
    assert error(many) < 2 * error(once)


def test_logits_of_all_positions_are_never_there_at_once():
    """No value of the program, forward or backward, is as large as the logits of more than one chunk."""
    length, vocab, chunk = 64, 40, 8
    hidden, targets = jnp.ones((2, length, 4)), jnp.zeros((2, length), jnp.int32)
    loss = lambda head, hidden: chunked_loss(partial(logits_of, head), hidden, targets, chunk=chunk)[0]
    largest = 0

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            largest = max([largest, *(np.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))])
            jax.tree.map(visit, [j for p in equation.params.values() for j in _jaxprs(p)])

    visit(jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((4, vocab)), hidden).jaxpr)
    assert largest == 2 * chunk * vocab


def _jaxprs(value):
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


@given(length=st.integers(1, 5000), most=st.integers(0, 3000))
def test_chunks_by_memory_are_within_it_and_even(length, most):
    chunk = _even_chunk(length, most)
    assert 1 <= chunk <= max(most, 1) or chunk == length <= most
    chunks = -(-length // chunk)
    assert chunks == 1 or chunk * chunks - length < 8 * chunks  # little is padded


def test_chunks_by_memory_follow_batch_and_vocabulary():
    seen = []

    def logits(hidden):
        seen.append(hidden.shape[1])
        return jnp.zeros((*hidden.shape[:2], 2**15), jnp.float32)

    loss = lambda hidden: chunked_loss(logits, hidden, jnp.zeros(hidden.shape[:2], jnp.int32))
    jax.eval_shape(loss, jax.ShapeDtypeStruct((8, 1000, 4), jnp.float32))
    assert max(seen) == 256
    assert CHUNK_LOGITS == 8 * 256 * 2**15  # 1000 in 4 chunks of 250, a multiple of 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk": 0}, "chunk: must be >= 1, got 0"),
        ({"z_loss": -1.0}, "z_loss: must lie between 0.0 and 1.0 .* got -1.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        chunked_loss(partial(logits_of, HEAD), STATES, TARGETS, **options)


# Gradients in parts.


def loss_and_grad(head, batch, z_loss=0.01):
    hidden, targets, mask = batch
    loss = lambda head: chunked_loss(partial(logits_of, head), hidden, targets, mask, chunk=5, z_loss=z_loss)
    return jax.value_and_grad(loss, has_aux=True)(head)


@partial(jax.jit, static_argnames="parts")
def in_parts(head, batch, parts):
    return accumulate(partial(loss_and_grad, head), batch, parts)


@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, LENGTH), min_size=BATCH, max_size=BATCH), parts=st.sampled_from([1, 2, 4]))
def test_parts_are_averaged_over_their_tokens(counts, parts):
    """Whatever the masks, rows and whole parts without any target included."""
    mask = jnp.arange(LENGTH) < jnp.array(counts)[:, None]
    (loss, sums), grads = in_parts(HEAD, (STATES, TARGETS, mask), parts)
    (expected, expected_sums), expected_grads = in_parts(HEAD, (STATES, TARGETS, mask), 1)
    assert_close((loss, grads), (expected, expected_grads))
    np.testing.assert_array_equal(sums.counts, expected_sums.counts)
    np.testing.assert_allclose(sums.nats, expected_sums.nats, rtol=1e-5, atol=1e-6)


def test_parts_without_masks_and_of_low_precision_are_float32():
    batch = (STATES.astype(jnp.bfloat16), TARGETS, None)
    (loss, _), grads = in_parts(HEAD.astype(jnp.bfloat16), batch, 2)
    assert loss.dtype == grads.dtype == jnp.float32


def test_part_i_takes_every_so_many_rows():
    seen = []

    def record(batch):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows).tolist()), batch[1][:, 0], ordered=True)
        return loss_and_grad(HEAD, batch)

    rows = jnp.broadcast_to(jnp.arange(BATCH)[:, None], (BATCH, LENGTH))
    jax.block_until_ready(accumulate(record, (STATES, rows, None), 2))
    jax.effects_barrier()
    assert seen == [[0, 2], [1, 3]]


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate: must divide the batch size 4, got 3"):
        in_parts(HEAD, (STATES, TARGETS, None), 3)


_DEVICES = """
import re
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from nosa_jax.train import accumulate, chunked_loss

mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
head = jax.device_put(jnp.ones((6, 11)), everywhere)
batch = jax.device_put((jnp.ones((8, 13, 6)), jnp.zeros((8, 13), jnp.int32)), rows)

def part(head, hidden, targets):
    return chunked_loss(lambda x: jnp.einsum("bth,hv->btv", x, head), hidden, targets, chunk=5)

def step(head, batch):
    return accumulate(lambda batch: jax.value_and_grad(part, has_aux=True)(head, *batch), batch, 2)

found = {}
for name, function in (("loss", lambda head, batch: part(head, *batch)), ("step", step)):
    program = jax.jit(function).lower(head, batch).compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(rf" ({kinds})[(-]", program), (name, program)
    found[name] = "all-reduce" in program
print(found)
"""


@pytest.mark.slow
def test_rows_stay_on_their_devices():
    """Neither chunks nor parts move a row: devices only add up their sums."""
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "{'loss': True, 'step': True}", done.stderr[-2000:]
