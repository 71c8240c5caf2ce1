"""Steps of training on eight devices are what they are on one, and the devices tell each other no more than they must.

What is judged here is found by `parallel_steps.py`, which has the cases.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import jax
import numpy as np
import parallel_steps
import pytest
from eight_devices import of_case
from parallel_steps import CONFIG, GROUPS, LENGTH, REPLAYED, ROWS, SELECTING
from support import but_slow

HIDDEN, KV_HEADS, DIM = CONFIG.hidden_size, CONFIG.num_kv_heads, CONFIG.head_dim
MATRICES = {  # of one layer, as they are gathered
    (HIDDEN, KV_HEADS, CONFIG.group_size + 2, DIM),
    (CONFIG.num_heads * DIM, HIDDEN),
    (HIDDEN, 2, CONFIG.intermediate_size),
    (CONFIG.intermediate_size, HIDDEN),
}
TABLE = (CONFIG.vocab_size, HIDDEN)


def cases_of(*groups: str) -> list[Any]:
    """(group, name) of every case; slow but for those of `few`."""
    return [
        pytest.param(group, name, marks=() if group == "few" else pytest.mark.slow, id=f"{group}-{name}")
        for group in groups
        for name in GROUPS[group][0]
    ]


@pytest.mark.parametrize(
    ("group", "name"), cases_of("few", "axes", "pairs", "explicit", "variants", "batches", "options")
)
def test_gradients_are_those_of_one_device(group, name):
    """Of every parameter, in norm; and everything lies after a step where it lay before, as its type says on Explicit
    axes. (Where the results of `jax.grad` alone lie on Auto axes, the compiler chooses.)"""
    found = of_case("parallel_steps", group, name, optimized=group == "axes")
    worst = max(found["gradients"], key=found["gradients"].get)
    assert found["gradients"][worst] < 1e-5, (worst, found["gradients"][worst])
    assert all(error < 1e-5 for error in found["metrics"].values()), found["metrics"]
    case = GROUPS[group][0][name]
    assert found["same_places"] or (case.way == "grad" and not case.explicit)


@pytest.mark.parametrize("name", but_slow(REPLAYED, *REPLAYED))
def test_losses_of_twenty_steps_are_those_of_one_device(name):
    """Where rounding decides no selection."""
    found = of_case("parallel_steps", "replayed", name)
    ours, theirs = np.array(found["mesh"]), np.array(found["alone"][0])
    assert theirs[-1] < 0.9 * theirs[0]  # it learns: the curve is of many different models
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", but_slow(SELECTING, *SELECTING))
def test_losses_of_a_variant_that_selects(name):
    """Near-ties are decided by rounding, and so does one device decide some otherwise when rows change places."""
    found = of_case("parallel_steps", "selecting", name)
    ours, orders = np.array(found["mesh"]), np.array(found["alone"])
    assert orders[0, -1] < 0.9 * orders[0, 0]
    np.testing.assert_allclose(ours[:5], orders[0, :5], rtol=1e-5)
    spread = np.maximum.accumulate(np.ptp(orders, axis=0))
    assert (np.abs(ours - orders[0]) <= np.maximum(2 * spread, 1e-5 * orders[0])).all(), (ours - orders[0], spread)


# ---- What devices tell each other, in the compiled program ----


def told(group: str, name: str, **where: bool) -> collections.Counter:
    """How often each (kind, dtype, shape) is told, `in_layers` and `backward` as given."""
    found = of_case("parallel_steps", group, name, optimized=group == "axes")["collectives"]
    assert found
    return collections.Counter(
        (x["kind"], x["dtype"], tuple(x["shape"])) for x in found if all(x[key] == is_ for key, is_ in where.items())
    )


def assert_sums_of_gradients(told: collections.Counter) -> None:
    """Nothing but sums of what is as large as a parameter, of numbers, and of the loss by position."""
    layers = jax.tree.leaves(parallel_steps.made_model("nosa").layers)
    sizes = {math.prod(leaf.shape[1:]) for leaf in layers} | {HIDDEN, math.prod(TABLE), 1, LENGTH}
    for kind, dtype, shape in told:
        assert kind == "all-reduce" and dtype in ("f32", "s32"), (kind, dtype, shape)
        assert math.prod(shape) in sizes, shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "data full", "data infllmv2", "data dma"])
def test_data_sums_gradients_alone(name):
    assert_sums_of_gradients(told("axes", name))
    # Once per parameter and layer: those of the loop over layers are in it.
    assert not told("axes", name, in_layers=True, backward=False)


@pytest.mark.parametrize("group", ["few", pytest.param("axes", marks=pytest.mark.slow)])
def test_fsdp_gathers_each_matrix_once_per_pass(group):
    for backward in (False, True):
        found = told(group, "fsdp", in_layers=True, backward=backward)
        gathered = {shape: n for (kind, _, shape), n in found.items() if kind == "all-gather"}
        assert gathered == dict.fromkeys(MATRICES, 1), backward
    outside = told(group, "fsdp", in_layers=False)
    # The embedding is looked up in, and makes the logits, at the two ends of the model.
    assert {key: n for key, n in outside.items() if key[0] == "all-gather"} == {("all-gather", "f32", TABLE): 2}
    everything = told(group, "fsdp")
    assert_sums_of_gradients(collections.Counter({key: n for key, n in everything.items() if key[0] != "all-gather"}))


@pytest.mark.slow
def test_tensor_sums_activations_twice_per_layer_and_pass():
    activation, importance = (ROWS, LENGTH, HIDDEN), (ROWS, LENGTH, KV_HEADS)
    forward = told("axes", "tensor", in_layers=True, backward=False)
    assert forward == {("all-reduce", "f32", activation): 2, ("all-reduce", "f32", importance): 1}
    backward = told("axes", "tensor", in_layers=True, backward=True)
    large = {key: n for key, n in backward.items() if math.prod(key[2]) >= LENGTH}
    assert large == {("all-reduce", "f32", activation): 2, ("all-gather", "f32", importance): 1}
    assert all(shape == () for _, _, shape in told("axes", "tensor", in_layers=False))


@pytest.mark.slow
def test_a_vocabulary_that_is_cut_sums_what_the_softmax_needs():
    """And one gradient of activations: that of the hidden states, to which every part of the head adds."""
    for where in ({"backward": False}, {"backward": True}):
        layers = told("axes", "tensor untied", in_layers=True, **where)
        tied = told("axes", "tensor", in_layers=True, **where)
        assert layers == tied
    outside = told("axes", "tensor untied", in_layers=False)
    assert all(kind == "all-reduce" for kind, _, _ in outside)
    large = {shape: n for (_, _, shape), n in outside.items() if math.prod(shape) > ROWS * LENGTH}
    assert large == {(ROWS, LENGTH, HIDDEN): 1}


@pytest.mark.slow
def test_context_gathers_keys_values_and_importance():
    keys, importance = (ROWS, KV_HEADS, LENGTH, DIM), (ROWS, KV_HEADS, LENGTH)
    forward = told("axes", "context", in_layers=True, backward=False)
    assert forward == {("all-gather", "f32", keys): 2, ("all-gather", "f32", importance): 1}
    backward = told("axes", "context", in_layers=True, backward=True)
    scattered = {shape: n for (kind, _, shape), n in backward.items() if kind == "reduce-scatter"}
    assert scattered == {(ROWS, KV_HEADS, LENGTH // 2, DIM): 2, (ROWS, KV_HEADS, LENGTH // 2): 1}
    assert_sums_of_gradients(collections.Counter({k: n for k, n in backward.items() if k[0] != "reduce-scatter"}))
    assert_sums_of_gradients(told("axes", "context", in_layers=False))


def test_tensor_and_context_together():
    """Each tells what it does alone, of what a device has: half of the positions, one KV head."""
    half = LENGTH // 2
    activation, importance = (ROWS, half, HIDDEN), (ROWS, half, KV_HEADS)
    forward = told("few", "tensor context", in_layers=True, backward=False)
    assert forward == {
        ("all-reduce", "f32", activation): 2,
        ("all-reduce", "f32", importance): 1,
        ("all-gather", "f32", (ROWS, 1, LENGTH, DIM)): 2,
        ("all-gather", "f32", (ROWS, 1, LENGTH)): 1,
    }
    backward = told("few", "tensor context", in_layers=True, backward=True)
    large = {key: n for key, n in backward.items() if ROWS in key[2]}
    # Where XLA makes little effort it gathers one thing twice.
    assert 1 <= large.pop(("all-gather", "f32", importance)) <= 2
    assert large == {
        ("all-reduce", "f32", activation): 2,
        ("reduce-scatter", "f32", (ROWS, 1, half, DIM)): 2,
        ("reduce-scatter", "f32", (ROWS, 1, half)): 1,
    }
