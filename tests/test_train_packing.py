"""Rows made from documents: every token once, no target in another document, blocks, what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nosa_jax.attention.layout import as_segment_ids
from nosa_jax.train.data.documents import Collector, Tokens
from nosa_jax.train.data.packing import pack
from nosa_jax.train.data.rows import PackedRows, WindowRows
from nosa_jax.train.data.split import split_spans

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def collect(sizes, *, masked=False):
    """Documents whose tokens are 0, 1, 2, ...; every third is not learned."""
    collector, at = Collector(np.dtype(np.int32), masked=masked), 0
    for size in sizes:
        ids = np.arange(at, at + size)
        collector.add(ids, ids % 3 > 0 if masked else None)
        at += size
    return collector.finish()


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 30))
def test_bins_hold_what_they_can(sizes, capacity):
    bins = pack(np.array(sizes, np.int64), capacity)
    filled = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert (filled > 0).all() and (filled <= capacity).all()
    # Of best fit: no two bins could be one.
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > capacity


def test_pieces_that_fit_together_share_a_bin():
    bins = pack(np.array([6, 1, 5, 2, 3, 4, 7]), 7)
    assert [sorted(np.array([6, 1, 5, 2, 3, 4, 7])[bins == b].tolist()) for b in range(4)] == [
        [7],
        [1, 6],
        [2, 5],
        [3, 4],
    ]


@given(sizes, st.sampled_from([4, 8]), st.integers(1, 5), st.booleans())
def test_packed_rows_hold_every_token_once_and_no_target_of_another_document(sizes, block_size, blocks, masked):
    tokens, spans = collect(sizes, masked=masked)
    rows = PackedRows(tokens, spans, blocks * block_size, block_size)
    found = [np.stack(column) for column in zip(*rows, strict=True)]
    ids, targets, mask, segments = found
    assert all(array.shape == (len(rows), blocks * block_size) for array in found)
    real = segments >= 0
    assert sorted(ids[real]) == list(range(sum(sizes)))

    document = np.repeat(np.arange(len(sizes)), sizes)
    last = spans[document[ids], 1] - 1 == ids
    targeted = real & ~last
    np.testing.assert_array_equal(targets[targeted], ids[targeted] + 1)
    learned = targets % 3 > 0 if masked else True
    np.testing.assert_array_equal(mask, targeted & learned)
    # `forward` takes them: each document, and each piece of a long one, starts on a block boundary and is in one piece.
    as_segment_ids(segments, segments.shape, block_size)
    same = (segments[:, 1:] == segments[:, :-1]) & real[:, 1:]
    np.testing.assert_array_equal(np.diff(ids, axis=1)[same], 1)
    assert (document[ids][:, 1:] == document[ids][:, :-1])[same].all()


@settings(max_examples=40)
@given(sizes, st.sampled_from([3, 16]), st.floats(0, 0.9), st.booleans())
def test_windows_hold_the_documents_one_after_the_other(sizes, length, fraction, masked):
    tokens, spans = collect(sizes, masked=masked)
    for kept in split_spans(spans, fraction, 0):
        text = np.concatenate([np.arange(0), *(np.arange(*span) for span in kept)])
        for partial in (False, True):
            rows = WindowRows(tokens, kept, length, partial=partial)
            targets = np.concatenate([np.zeros(0, int), *(row.targets for row in rows)])
            inputs = np.concatenate([np.zeros(0, int), *(row.tokens for row in rows)])
            count = max(len(text) - 1, 0)
            count = count if partial else count // length * length
            np.testing.assert_array_equal(targets[:count], text[1 : count + 1])
            np.testing.assert_array_equal(inputs[:count], text[:count])
            assert len(rows) == -(-count // length)
            masks = [row.mask for row in rows]
            if not (masked or partial):
                assert masks == [None] * len(rows)
            elif masks:
                learned = text[1 : count + 1] % 3 > 0 if masked else np.ones(count, bool)
                np.testing.assert_array_equal(np.concatenate(masks), np.append(learned, [False] * (-count % length)))


@given(sizes, st.floats(0, 0.9), st.integers(0, 3))
def test_a_document_is_trained_on_or_held_out(sizes, fraction, seed):
    _, spans = collect(sizes)
    train, heldout = split_spans(spans, fraction, seed)
    ids = lambda spans: [i for span in spans for i in range(*span)]
    assert sorted(ids(train) + ids(heldout)) == list(range(sum(sizes)))
    whole = set(map(tuple, spans.tolist()))
    cut = [tuple(span) for span in [*train.tolist(), *heldout.tolist()] if tuple(span) not in whole]
    assert len(cut) in (0, 2)  # the start of one document and its end
    if fraction and sum(sizes) > 100:
        assert abs(len(ids(heldout)) - fraction * sum(sizes)) <= 0.2 * fraction * sum(sizes) + 1


def test_tokens_are_read_across_their_shards():
    shards = [np.arange(5, dtype=np.uint8), np.zeros(0, np.uint16), np.arange(5, 7), np.arange(7, 20, dtype=np.uint32)]
    tokens = Tokens(shards, [shard % 2 == 0 for shard in shards])
    assert tokens.size == tokens.vocab_size == 20
    for start in range(20):
        for stop in range(start + 1, 21):
            np.testing.assert_array_equal(tokens.read(start, stop), np.arange(start, stop))
            np.testing.assert_array_equal(tokens.read_learned(start, stop), np.arange(start, stop) % 2 == 0)


def test_what_is_read_is_not_copied():
    shard = np.arange(100)
    assert np.shares_memory(Tokens([shard]).read(3, 50), shard)


def test_checksums_tell_tokens_and_what_is_learned():
    checksum = lambda array, flags=None: Tokens([array], flags).checksum
    ids = np.arange(200)
    assert len({checksum(ids), checksum(ids[::-1]), checksum(ids + 1)}) == 3
    assert checksum(ids) == Tokens([ids[:9], ids[9:]]).checksum
    assert checksum(ids, [ids < 3]) != checksum(ids, [ids < 4])


@pytest.mark.parametrize("chunk", [3, 100])
def test_looking_in_parts_finds_the_same(monkeypatch, chunk):
    monkeypatch.setattr("nosa_jax.train.data.documents._CHUNK", chunk)
    seen = []
    ids = np.array([1, 0, 5, 0, 0, 7, 2, 0, 9, 4])
    tokens = Tokens([ids[:4], ids[4:]], end_of_document=0, progress=seen.append)
    assert tokens.ends.tolist() == [2, 4, 5, 8] and tokens.vocab_size == 10 and sum(seen) == 10
    assert tokens.checksum == Tokens([ids]).checksum
    collector = Collector(np.dtype(np.uint8))
    for size in (2, 0, 5, 1):
        collector.add(list(range(size)))
    found, spans = collector.finish()
    assert found.read(0, 8).tolist() == [0, 1, 0, 1, 2, 3, 4, 0] and spans.tolist() == [[0, 2], [2, 7], [7, 8]]
