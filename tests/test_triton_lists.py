"""Who selected what: blocks of a tile of queries, queries of a block; written out once, then against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, blocks
from pallas_kernels.block_attention import _lists
from pallas_kernels.block_attention.cases import SMALL, make_inputs


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with _backend.interpreted():
        yield


# Eight queries over three blocks of 16 tokens; the last is padding, so that its ids mean nothing.
POSITIONS = [0, 5, 15, 16, 31, 32, 47, -1]
IDS = [[0, -1], [0, 2], [0, 1], [1, 0], [-7, 1], [2, 0], [2**31 - 1, 2], [0, 1]]
SELECTED = [{0}, {0}, {0}, {0, 1}, {1}, {0, 2}, {2}, set()]  # what is left once the future is dropped


def table_of(ids, positions, first_block=None, **sizes):
    arrays = (None if x is None else jnp.asarray(x, jnp.int32) for x in (ids, positions, first_block))
    return _lists.bit_table(*arrays, **sizes)


def test_by_hand():
    table = table_of([[IDS]], [POSITIONS], num_blocks=3, block_size=16)
    assert table[0, 0].tolist() == [[0b00101111], [0b00011000], [0b01100000]]  # query 0 is the lowest bit

    union = _lists.unions(table, jnp.asarray([POSITIONS], jnp.int32), tile=4, width=3, block_size=16)
    assert union.counts[0, 0].tolist() == [[0, 2], [2, 3]]  # query 4 stands at the end of block 1
    assert union.block_ids[0, 0, 0, :2].tolist() == [0, 1] and union.members[0, 0, 0, :2].tolist() == [0b1111, 0b1000]
    assert union.block_ids[0, 0, 1].tolist() == [0, 1, 2] and union.members[0, 0, 1].tolist() == [0b10, 0b1, 0b110]

    cut = _lists.segments(table, entries=16, length=4, block_size=16)
    assert cut.queries[0, 0, :9].tolist() == [0, 1, 2, 3, 5, 3, 4, 5, 6]
    assert cut.first[0, 0].tolist() == [0, 2, 3, 4]
    assert cut.block[0, 0].tolist() == [0, 0, 1, 2, -1, -1, -1]
    assert cut.start[0, 0, :4].tolist() == [0, 4, 5, 7] and cut.stop[0, 0, :4].tolist() == [4, 5, 7, 9]
    assert cut.inside[0, 0, :4].tolist() == [4, 1, 2, 2]


def test_by_hand_is_what_is_seen():
    found = [
        {m for m in ids if 0 <= m < 3 and position >= 16 * m} for ids, position in zip(IDS, POSITIONS, strict=True)
    ]
    assert found == SELECTED


def test_ranges_of_dense_attention_by_hand():
    """The same queries, then two documents, of blocks 0 and 1 and of block 2."""
    positions = jnp.asarray([POSITIONS], jnp.int32)
    sizes = {"num_blocks": 3, "block_size": 16}
    assert _lists.prefixes(positions, None, tile=4, **sizes).counts[0].tolist() == [[0, 0, 2], [0, 2, 3]]
    packed = jnp.asarray([[0, 0, 2]], jnp.int32)
    found = _lists.prefixes(positions, packed, tile=4, **sizes)
    # Query 4 is of the first document, the rest of its tile of the second: it masks all that it visits.
    assert found.counts[0].tolist() == [[0, 0, 2], [0, 0, 3]] and found.first[0].tolist() == [0, 0, 0, 0, 0, 2, 2, 0]
    assert _lists.last_positions(positions, None, **sizes)[0].tolist() == [47, 47, 47]
    assert _lists.last_positions(positions, packed, **sizes)[0].tolist() == [31, 31, 47]
    seen = {
        None: [range(7), range(3, 7), range(5, 7)],
        "packed": [range(5), range(3, 5), range(5, 7)],
    }
    for kind, expected in seen.items():
        cut = _lists.ranges(positions, None if kind is None else packed, kv_heads=1, length=4, **sizes)
        pieces = [range(a, b) for a, b in zip(cut.start[0, 0].tolist(), cut.stop[0, 0].tolist(), strict=True)]
        assert [[*a, *b] for a, b in zip(pieces[::2], pieces[1::2], strict=True)] == [list(x) for x in expected]
        assert cut.inside[0, 0].tolist() == [3, 0, 2, 0, 2, 0]
        assert cut.block[0, 0].tolist() == [0, 0, 1, 1, 2, 2] and cut.first[0, 0].tolist() == [0, 2, 4, 6]
    nobody = _lists.prefixes(jnp.full((1, 4), -1), None, tile=4, **sizes)
    assert nobody.counts[0].tolist() == [[0, 0, 0]]


def selections(name):
    """(sizes, arguments of the table, selected [B, K, T, M]) of a case."""
    case = SMALL[name]
    inputs = {n: x if x is None else np.asarray(x) for n, x in make_inputs(case, jax.random.key(4)).items()}
    sizes = {"num_blocks": case.rows.num_blocks, "block_size": case.rows.block_size}
    ids, positions, first_block = (inputs[n] for n in ("block_ids", "positions", "first_block"))
    selected = (ids[..., None] == np.arange(sizes["num_blocks"])).any(-2)
    return sizes, (ids, positions, first_block), selected


@pytest.mark.parametrize("name, tile", [("k2_g1_packed", 32), ("k2_g4_ragged", 16), ("k1_g16_spans", 1)])
def test_unions(name, tile):
    sizes, (ids, positions, first_block), selected = selections(name)
    size = sizes["block_size"]
    padded = np.pad(positions, ((0, 0), (0, -positions.shape[1] % tile)), constant_values=-1)
    selected = np.pad(selected, ((0, 0), (0, 0), (0, padded.shape[1] - positions.shape[1]), (0, 0)))
    width = min(sizes["num_blocks"], tile * ids.shape[-1])
    table = table_of(ids, positions, first_block, **sizes)
    union = jax.tree.map(np.asarray, _lists.unions(table, jnp.asarray(padded), tile=tile, width=width, block_size=size))
    for b, h, i in np.ndindex(union.counts.shape[:3]):
        here = slice(i * tile, (i + 1) * tile)
        wanted = np.flatnonzero(selected[b, h, here].any(0))
        before, count = union.counts[b, h, i]
        assert count == len(wanted)
        np.testing.assert_array_equal(union.block_ids[b, h, i, :count], wanted)
        bits = (union.members[b, h, i, :count].astype(np.uint32) >> np.arange(tile)[:, None]) & 1
        np.testing.assert_array_equal(bits, selected[b, h, here][:, wanted])
        real = padded[b, here][padded[b, here] >= 0]
        assert before == (size * (wanted + 1) <= real.min(initial=2**30) + 1).sum()


@pytest.mark.parametrize(
    "name, length",
    [
        pytest.param("k2_g1_packed", 16, marks=pytest.mark.slow),
        pytest.param("k2_g4_ragged", 1024, marks=pytest.mark.slow),
        ("k1_g16_spans", 5),
    ],
)
def test_segments(name, length):
    sizes, (ids, positions, first_block), selected = selections(name)
    entries = positions.shape[1] * min(sizes["num_blocks"], ids.shape[-1])
    table = table_of(ids, positions, first_block, **sizes)
    cut = jax.tree.map(
        np.asarray, _lists.segments(table, entries=entries, length=length, block_size=sizes["block_size"])
    )
    for b, h in np.ndindex(cut.first.shape[:2]):
        used = cut.first[b, h, -1]
        assert (cut.block[b, h, used:] == -1).all()
        for m in range(sizes["num_blocks"]):
            mine = range(cut.first[b, h, m], cut.first[b, h, m + 1])
            assert (cut.block[b, h, mine] == m).all()
            pieces = [cut.queries[b, h, cut.start[b, h, e] : cut.stop[b, h, e]] for e in mine]
            masked = np.concatenate(
                [piece[:n] for piece, n in zip(pieces, cut.inside[b, h, mine], strict=True)] or [[]]
            )
            own = np.flatnonzero(selected[b, h, :, m] & (positions[b] // sizes["block_size"] == m))
            assert set(own) <= set(masked)
            assert all(0 < len(piece) <= length for piece in pieces)
            found = np.concatenate([*pieces, np.zeros(0, np.int32)])
            np.testing.assert_array_equal(found, np.flatnonzero(selected[b, h, :, m]))


@pytest.mark.slow
def test_more_queries_than_one_program_lists():
    """Two chunks of the inversion, the second one short, and words of the table whose sign bit is set."""
    length = _lists._CHUNK + 70
    rng = np.random.default_rng(0)
    positions = np.arange(length)[None]
    own = positions[0] // 64
    ids = np.stack([own, np.where(own > 0, rng.integers(0, np.maximum(own, 1)), -1)], axis=-1)[None, None]
    num_blocks = blocks.num_blocks(length, 64)
    table = table_of(ids, positions, num_blocks=num_blocks, block_size=64)
    assert (np.asarray(table) < 0).any()
    cut = jax.tree.map(np.asarray, _lists.segments(table, entries=2 * length, length=128, block_size=64))
    for m in range(num_blocks):
        start = cut.start[0, 0, cut.first[0, 0, m]]
        expected = np.flatnonzero((ids[0, 0] == m).any(-1))
        np.testing.assert_array_equal(cut.queries[0, 0, start : start + len(expected)], expected)
