"""Blocks between host and device: the loops over numpy arrays say what moves, memory kinds say where it lies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import fetch_blocks, write_back_blocks
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.fetch_blocks import reference
from pallas_kernels.fetch_blocks.cases import SMALL, make_inputs, of_all_layers, staged

fetch = jax.jit(functools.partial(fetch_blocks, implementation="xla"))
write_back = jax.jit(functools.partial(write_back_blocks, implementation="xla"))


def assert_same(array, expected, memory_kind):
    assert array.sharding.memory_kind == memory_kind
    np.testing.assert_array_equal(np.asarray(array), expected)


def assert_moves_like_numpy(inputs):
    assert inputs["host"].sharding.memory_kind == "pinned_host"
    plain = on_numpy(inputs)
    assert_same(fetch(**inputs), reference.fetch_blocks_ref(**plain), "device")
    layer = staged(inputs)
    assert_same(fetch(**layer), reference.fetch_blocks_ref(**on_numpy(layer)), "device")
    for back in (of_all_layers(inputs), layer):
        assert_same(write_back(**back), reference.write_back_blocks_ref(**on_numpy(back)), "pinned_host")
    # Neither changes what it reads, nor where that lies.
    assert_same(inputs["host"], plain["host"], "pinned_host")
    assert_same(inputs["pool"], plain["pool"], "device")


@pytest.mark.parametrize("name", SMALL)
def test_cases(name):
    inputs = make_inputs(SMALL[name], jax.random.key(0))
    assert_moves_like_numpy(inputs)
    moved = np.asarray(fetch(**inputs)) != np.asarray(inputs["pool"])
    case = SMALL[name]
    slots = moved.any((-1, -2, -3))
    assert slots[-1].sum() == case.moves * case.batch * case.kv_heads and not slots[:-1].any()


CASE = SMALL["one_head"]
WILD = [-(2**31), -1, 2**31 - 1]


@functools.cache
def one_head():
    return make_inputs(CASE, jax.random.key(0))


@settings(max_examples=40)
@given(st.data())
def test_out_of_range_moves_nothing(data):
    """Ids and slots in any order, each at most once among those in range, wild numbers anywhere."""

    def draw(count):
        order = data.draw(st.permutations(range(count)))[: CASE.width]
        order = [*order, *[-1] * (CASE.width - len(order))]
        wild = data.draw(st.lists(st.sampled_from([None, *WILD, count]), min_size=CASE.width, max_size=CASE.width))
        return jnp.asarray([n if w is None else w for n, w in zip(order, wild, strict=True)], jnp.int32)[None, None]

    layer = jnp.asarray(data.draw(st.integers(0, CASE.layers - 1)), jnp.int32)
    # A page beyond the store is the same modulo its pages; a negative one is none.
    table = np.asarray(one_head()["page_table"])
    table = np.where(data.draw(st.booleans()), table + table.size, table)
    table[0, data.draw(st.integers(0, CASE.blocks - 1))] = data.draw(st.sampled_from([-1, -(2**31), table[0, 0]]))
    ids = {"block_ids": draw(CASE.blocks), "slots": draw(CASE.slots), "page_table": jnp.asarray(table)}
    inputs = one_head() | ids | {"layer": layer}
    assert_moves_like_numpy(inputs)


def test_there_and_back():
    """Blocks fetched into slots and written back leave the host as it was; written elsewhere, they are copies."""
    inputs = make_inputs(SMALL["all"], jax.random.key(1))
    host, pool, layer = np.asarray(inputs["host"]), fetch(**inputs), inputs["layer"]
    moved = {name: inputs[name] for name in ("page_table", "block_ids", "slots")}
    assert_same(write_back(inputs["host"], pool, **moved, layer=layer), host, "pinned_host")


def test_inside_loops_with_donated_arrays():
    """As decoding uses them: host store and pool in the carry, the layer a traced number, layer after layer fetched and
    all written back."""
    case = SMALL["all"]
    inputs = make_inputs(case, jax.random.key(2))
    plain = on_numpy(inputs)
    table, ids, slots = (inputs[name] for name in ("page_table", "block_ids", "slots"))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(host, pool):
        def body(_, carry):
            host, pool = carry
            layer_step = lambda layer, pool: fetch_blocks(pool, host, table, ids, slots, layer) + 1
            pool = jax.lax.fori_loop(0, case.layers, layer_step, pool)
            back = of_all_layers({"host": host, "pool": pool, "page_table": table, "block_ids": ids, "slots": slots})
            return write_back_blocks(**back), pool

        return jax.lax.fori_loop(0, 2, body, (host, pool))

    host, pool = step(inputs["host"], inputs["pool"])
    true_host, true_pool = plain["host"], plain["pool"]
    back = on_numpy(of_all_layers(inputs))
    for _ in range(2):
        for layer in range(case.layers):
            moves = {name: plain[name] for name in ("page_table", "block_ids", "slots")} | {"layer": layer}
            true_pool = reference.fetch_blocks_ref(pool=true_pool, host=true_host, **moves) + np.asarray(
                1, true_pool.dtype
            )
        true_host = reference.write_back_blocks_ref(**(back | {"host": true_host, "pool": true_pool}))
    assert_same(host, true_host, "pinned_host")
    assert_same(pool, true_pool, "device")
