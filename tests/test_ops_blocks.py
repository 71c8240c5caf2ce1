"""The geometry of blocks and windows, spelled out in matrices small enough to check by eye."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blocks

GOLDEN = Path(__file__).parent / "golden" / "cases"
INF = np.inf


def ints(*values):
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize("tokens, count", [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (205, 4)])
def test_num_blocks(tokens, count):
    assert blocks.num_blocks(tokens, 64) == count


@pytest.mark.parametrize("tokens, count", [(0, 0), (15, 0), (16, 0), (31, 0), (32, 1), (47, 1), (48, 2), (205, 11)])
def test_num_windows(tokens, count):
    assert blocks.num_windows(tokens, 16) == count


def test_query_blocks():
    np.testing.assert_array_equal(blocks.query_blocks(ints([0, 3, 4, -1, 11]), 4), [[0, 0, 1, -1, 2]])


def test_query_first_blocks():
    # Two documents: blocks 0-1 and 2-3. Padding takes the first block; it sees nothing anyway.
    first = blocks.query_first_blocks(ints([0, 7, 8, 15, -1]), ints([0, 0, 2, 2]), 4)
    np.testing.assert_array_equal(first, [[0, 0, 2, 2, 0]])
    np.testing.assert_array_equal(blocks.query_first_blocks(ints([0, 7, 8]), None, 4), [[0, 0, 0]])


def test_visible_windows():
    # Windows of 4 tokens every 2: 0-3, 2-5, 4-7, 6-9. One is visible from its last token on.
    positions = ints([-1, 2, 3, 4, 5, 9])
    visible = blocks.visible_windows(positions, jnp.zeros_like(positions), 4, block_size=4, stride=2)
    expected = [
        [0, 0, 0, 0],  # padding
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(visible[0], np.array(expected, bool))


def test_visible_windows_of_packed_documents():
    # The second document starts at token 4: windows 0-3 and 2-5 are none of its own.
    positions = ints([3, 5, 7, 9])
    first = ints([0, 1, 1, 1])
    visible = blocks.visible_windows(positions, first, 4, block_size=4, stride=2)
    expected = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(visible[0], np.array(expected, bool))


def test_pool_windows_to_blocks():
    # Two windows per block and the last one of the block before. Window 4 is the last: block 3 has none.
    windows = jnp.array([[1.0, 5.0, 2.0, 3.0, 0.0]])
    pooled = blocks.pool_windows_to_blocks(windows, None, blocks=4, ratio=2)
    np.testing.assert_array_equal(pooled, [[5, 5, 3, -INF]])


def test_pool_windows_to_blocks_of_packed_documents():
    # Block 1 starts a document: window 1, which crosses into it, does not count there.
    windows = jnp.array([[1.0, 5.0, 2.0, 3.0, 0.0]])
    pooled = blocks.pool_windows_to_blocks(windows, ints([0, 1, 1]), blocks=3, ratio=2)
    np.testing.assert_array_equal(pooled, [[5, 3, 3]])


def test_pool_windows_to_blocks_keeps_leading_axes():
    windows = jnp.arange(24.0).reshape(2, 3, 4)
    first = ints([0, 0], [0, 1])
    pooled = blocks.pool_windows_to_blocks(windows, first, blocks=2, ratio=2)
    np.testing.assert_array_equal(pooled, [[[1, 3], [5, 7], [9, 11]], [[13, 15], [17, 19], [21, 23]]])
    falling = blocks.pool_windows_to_blocks(-windows, first, blocks=2, ratio=2)
    np.testing.assert_array_equal(falling[:, 0], [[0, -1], [-12, -14]])  # only row 0 reaches to the left


def test_no_windows_at_all():
    np.testing.assert_array_equal(
        blocks.pool_windows_to_blocks(jnp.zeros((1, 0)), None, blocks=2, ratio=4), [[-INF, -INF]]
    )


def test_forced_and_visible():
    # 1 sink, 2 local blocks; one query per block, then padding.
    queries = ints([0, 1, 2, 3, -1])
    forced, visible = blocks.forced_and_visible(queries, jnp.zeros_like(queries), 4, sink=1, local=2)
    np.testing.assert_array_equal(visible[0], np.vstack([np.tri(4), np.zeros(4)]).astype(bool))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(forced[0], np.array(expected, bool))


def test_forced_and_visible_in_packed_documents():
    # A document from block 2 on: its sink is block 2, its local window does not reach back.
    forced, visible = blocks.forced_and_visible(ints([2, 4, 5]), ints([2, 2, 2]), 6, sink=1, local=2)
    np.testing.assert_array_equal(
        visible[0], np.array([[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], bool)
    )
    np.testing.assert_array_equal(
        forced[0], np.array([[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1]], bool)
    )


@pytest.mark.parametrize("case", ["maxpool_prefill_c", "maxpool_decode_a", "maxpool_decode_b"])
def test_pooling_and_forced_blocks_of_the_published_code(case):
    """Block scores that the published code pooled; it writes +inf into the blocks that it forces."""
    with np.load(GOLDEN / "units_ops.npz") as file:
        arrays = {name.split(".")[1]: file[name] for name in file.files if name.startswith(f"{case}.")}
    local, sink = arrays["local_init"].tolist()
    windows, theirs, compared = arrays["in"], arrays["out"], 0
    for b, cached in enumerate(arrays["cache_lens"]):
        # Prefill: all queries of one sequence. Decode: one query for each of several sequences.
        queries = np.arange(*arrays["cu_q"][b : b + 2])
        count = int(np.diff(arrays["cu_k"][b : b + 2])[0])
        positions = jnp.asarray(queries - queries[0] + cached, jnp.int32)[None]
        total = blocks.num_blocks(int(positions[0, -1]) + 1, 64)
        query_blocks = blocks.query_blocks(positions, 64)
        forced, visible = blocks.forced_and_visible(
            query_blocks, jnp.zeros_like(query_blocks), total, sink=sink, local=local + 1
        )
        ours = blocks.pool_windows_to_blocks(jnp.asarray(windows[:, queries, :count]), None, blocks=total, ratio=4)
        theirs_here = theirs[:, queries, :total]
        seen = np.asarray(visible[0])
        np.testing.assert_array_equal(np.isposinf(theirs_here[0])[seen], np.asarray(forced[0])[seen])
        plain = ~np.isposinf(theirs_here)
        np.testing.assert_array_equal(np.asarray(ours)[plain], theirs_here[plain])
        compared += plain.sum()
    assert compared > 20
