"""Every row of a batch is what it would be alone: ragged, extended, packed; prefill and decode agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    LENGTHS,
    NEW,
    OFFLOADED,
    REDUCED,
    SMALL,
    but_slow,
    forward,
    forward_one,
    lively_model,
    prompts,
    random_tokens,
    small_config,
    step,
    sure_rows,
)

import nosa_jax
from nosa_jax import CacheConfig
from nosa_jax.attention.layout import as_segment_ids
from nosa_jax.cache.working_set import Limits
from nosa_jax.decode.checks import as_prompt
from nosa_jax.decode.prompt import read_prompt

VARIANTS = ("nosa", "infllmv2", "dma", "full")
MANY = (1, 15, 16, 31, 32, 63, 64, 65, 700, 1203, 1500)
TOLERANCE = 5e-5


def assert_equivalent(model, tokens, ids, logits, *, start=0, bucket=256) -> None:
    """What a row computed from position `start` on is what its sequence [T] computes alone.

    ids [L, K, t, J] (None for `full`) and logits [t, V] of the row. Where a selection was decided by rounding alone the
    sequence is run again with the row's own ids, so that its logits stay comparable.
    """
    alone = forward_one(model, tokens, bucket=bucket)
    if ids is not None:
        end = start + ids.shape[2]
        same = (np.asarray(alone.block_ids[:, 0, :, start:end]) == np.asarray(ids)).all(-1)
        if not same.all():
            sure = sure_rows(model, tokens, np.asarray(alone.block_ids))[:, :, start:end]
            assert same[sure].all(), f"{(~same & sure).sum()} of {sure.sum()} sure selections differ"
            replay = np.array(alone.block_ids)
            replay[:, 0, :, start:end] = ids
            alone = forward_one(model, tokens, block_ids=replay, bucket=bucket)
    np.testing.assert_allclose(logits, alone.logits[0, start : start + logits.shape[0]], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "lengths", "bucket"),
    [
        pytest.param(2, 4, 64, MANY, 256, id="K2-G4-D64", marks=pytest.mark.slow),
        pytest.param(1, 16, 64, (31, 65, 700), 1, id="K1-G16-D64"),
        pytest.param(4, 1, 128, (31, 65, 700), 700, id="K4-G1-D128", marks=pytest.mark.slow),
        pytest.param(2, 8, 128, (31, 65, 700), 700, id="K2-G8-D128", marks=pytest.mark.slow),
    ],
)
def test_ragged_batch_equals_rows_alone(kv_heads, group, dim, lengths, bucket):
    """`bucket` 1: alone means a call of exactly that length."""
    model = lively_model(small_config(kv_heads, group, dim, REDUCED))
    tokens = random_tokens(len(lengths), max(lengths))
    batch = forward(model, tokens, np.array(lengths), record=True)
    assert np.isfinite(batch.logits).all()
    for row, length in enumerate(lengths):
        assert (batch.block_ids[:, row, :, length:] == -1).all()
        ids, logits = batch.block_ids[:, row, :, :length], batch.logits[row, :length]
        assert_equivalent(model, tokens[row, :length], ids, logits, bucket=bucket)


@pytest.mark.parametrize(
    ("width", "offload"),
    [
        *(pytest.param(width, True, marks=pytest.mark.slow) for width in (1, 7)),
        (64, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, False), (1000, True))),
    ],
)
def test_extend_equals_whole_prefill(width, offload):
    """A prompt read in pieces of any width, by rows of different lengths, ends in the same state as read at once."""
    total = 1203 if width == 1000 else 715
    model = lively_model(small_config(2, 4, 64, REDUCED))
    tokens = random_tokens(2, total, seed=3)
    lengths = np.array([total, 660 if width == 1 else total // 3])
    cache = CacheConfig(offload=offload)
    whole, whole_logits = nosa_jax.prefill(model, tokens, lengths, max_length=total + 8, cache=cache)
    first = 640 if width == 1 else 40
    state, logits = nosa_jax.prefill(model, tokens[:, :first], max_length=total + 8, cache=cache)
    extend = jax.jit(nosa_jax.extend, donate_argnums=1)
    for start in range(first, total, width):
        piece = tokens[:, start : start + width]
        counts = np.clip(lengths - start, 0, piece.shape[1])
        piece = np.pad(piece, ((0, 0), (0, width - piece.shape[1])))
        state, new_logits = extend(model, state, piece, counts)
        logits = jnp.where((counts > 0)[:, None], new_logits, logits)
    np.testing.assert_array_equal(state.lengths, whole.lengths)
    np.testing.assert_allclose(logits, whole_logits, atol=TOLERANCE)
    for ours, theirs in ((state.pooled_keys, whole.pooled_keys), (state.pooled_importance, whole.pooled_importance)):
        np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=TOLERANCE)
    if offload:
        np.testing.assert_array_equal(state.table.blocks, whole.table.blocks)


@pytest.mark.slow
def test_extend_after_decode_finds_the_unfinished_block():
    """A second turn: the block that decode was writing lives in its slot alone until it is full."""
    model = lively_model(small_config())
    state, _ = nosa_jax.prefill(model, prompts(), LENGTHS, max_length=300 + NEW, cache=OFFLOADED)
    decoded, following = random_tokens(21, 3, seed=8), random_tokens(3, 29, seed=9)
    for token in decoded:  # ends inside a block in every row, after crossing a boundary
        state, _ = step(model, state, token)
    counts = np.array([29, 13, 29])
    state, logits = nosa_jax.extend(model, state, following, counts)
    for row, length in enumerate(LENGTHS):
        sequence = np.concatenate([prompts()[row, :length], decoded[:, row], following[row, : counts[row]]])
        np.testing.assert_allclose(logits[row], forward_one(model, sequence).logits[0, -1], atol=TOLERANCE)


def test_chunked_prefill_equals_whole_prefill():
    model = lively_model(small_config())
    options = dict(max_length=300 + NEW, cache=OFFLOADED)
    whole, whole_logits = nosa_jax.prefill(model, prompts(), LENGTHS, **options)
    chunked, logits = nosa_jax.prefill(model, prompts(), LENGTHS, **options, chunk=64)
    np.testing.assert_allclose(logits, whole_logits, atol=TOLERANCE)
    np.testing.assert_array_equal(chunked.table.blocks, whole.table.blocks)
    np.testing.assert_array_equal(chunked.table.last_used, whole.table.last_used)


@pytest.mark.parametrize("variant", but_slow(VARIANTS, "infllmv2", "dma", "full"))
def test_decode_equals_forward(variant):
    """Step-by-step decode of a ragged batch is the forward pass of the whole sequences."""
    model = lively_model(small_config().with_attention(variant=variant))
    cache = CacheConfig() if variant == "full" else OFFLOADED
    gen = nosa_jax.generate(model, prompts(), LENGTHS, max_new_tokens=NEW, cache=cache, record=True)
    for row, length in enumerate(LENGTHS):
        sequence = np.concatenate([prompts()[row, :length], np.asarray(gen.tokens[row])])
        ids = None if gen.block_ids is None else gen.block_ids[:, row]
        assert_equivalent(model, sequence[:-1], ids, gen.logits[row], start=length - 1)


@pytest.mark.parametrize("variant", but_slow(VARIANTS, "infllmv2", "dma"))
def test_packed_rows_equal_documents_alone(variant):
    model = lively_model(small_config().with_attention(variant=variant))
    size = SMALL.block_size
    documents = [[205, 16, 63], [100, 1, 150]]
    tokens, segments, spans = [], [], []
    for row, lengths in enumerate(documents):
        ids = np.full((320,), -1, np.int32)
        start = 0
        for name, length in enumerate(lengths):
            ids[start : start + length] = name
            spans.append((row, start, length))
            start += -(-length // size) * size
        segments.append(ids)
        tokens.append(random_tokens(320, seed=row))
    tokens, segments = np.stack(tokens), np.stack(segments)
    packed = forward(model, tokens, segment_ids=segments, record=True)
    assert np.isfinite(packed.logits).all()
    for row, start, length in spans:
        ids = None
        if variant != "full":
            ids = np.asarray(packed.block_ids[:, row, :, start : start + length])
            ids = np.where(ids >= 0, ids - start // size, -1)
        assert_equivalent(model, tokens[row, start : start + length], ids, packed.logits[row, start : start + length])
    if variant != "full":
        assert (np.asarray(packed.block_ids)[:, 0, :, segments[0] < 0] == -1).all()


def test_segment_ids_padding_by_zero_inside_a_block():
    """Documents counted from 1 and padded with 0 up to the block are the same documents."""
    model = lively_model(small_config())
    tokens = random_tokens(1, 64)
    segments = np.repeat(np.array([1, 1, 2, 2]), 16)[None]
    padded = segments.copy()
    segments[0, 25:32], padded[0, 25:32] = 0, -1
    a = forward(model, tokens, segment_ids=segments, record=True)
    b = forward(model, tokens, segment_ids=padded, record=True)
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.block_ids, b.block_ids)


# Rows of 64 tokens in blocks of 16, and the documents in them: (start, length). Everything else is padding.
UNUSUAL_ROWS = {
    "padding in the middle": ([0] * 28 + [-1] * 4 + [0] * 32, [(0, 28), (32, 32)]),
    "a block of padding in the middle": ([0] * 16 + [-1] * 16 + [0] * 32, [(0, 16), (32, 32)]),
    "0 in the middle of document 1": ([1] * 20 + [0] * 12 + [1] * 32, [(0, 20), (32, 32)]),
    "0 after document 1 to the end": ([1] * 20 + [0] * 44, [(0, 20)]),
    "0 and -1 after document 1": ([1] * 20 + [-1] * 4 + [0] * 8 + [2] * 32, [(0, 20), (32, 32)]),
    "padding first": ([-1] * 16 + [3] * 48, [(16, 48)]),
    "padding alone": ([-1] * 64, []),
}
# What is refused where it can be seen, and padding where it cannot.
MISALIGNED_ROWS = {
    "goes on inside the block": ([0] * 20 + [-1] * 4 + [0] * 40, [(0, 20)], "document 0 at token 24"),
    "0 inside document 1": ([1] * 20 + [0] * 4 + [1] * 40, [(0, 20)], "document 1 at token 24"),
    "starts inside a block": ([0] * 5 + [1] * 27 + [2] * 32, [(0, 5), (32, 32)], "document 1 at token 5"),
    "padding before a document": ([-1] * 4 + [0] * 12 + [1] * 48, [(16, 48)], "document 0 at token 4"),
}
ALL_ROWS = {name: row[:2] for name, row in (UNUSUAL_ROWS | MISALIGNED_ROWS).items()}
BEYOND = [0] * 32 + [1] * 8 + [2] * 3 + [0] * 21, [(0, 32), (32, 5)]  # of a row that is 37 long


@functools.cache
def unusual_rows():
    """Tokens, the same with others at padded places, which places are real, and the forward pass of both."""
    documents = [of_row for _, of_row in (*ALL_ROWS.values(), BEYOND)]
    segments = np.array([ids for ids, _ in (*ALL_ROWS.values(), BEYOND)], np.int32)
    real = np.zeros(segments.shape, bool)
    for row, of_row in enumerate(documents):
        for start, length in of_row:
            real[row, start : start + length] = True
    tokens = random_tokens(*segments.shape)
    other = np.where(real, tokens, random_tokens(*segments.shape, seed=9))
    lengths = np.array([64] * len(ALL_ROWS) + [37])
    run = lambda tokens: forward(lively_model(small_config()), tokens, lengths, segment_ids=segments, record=True)
    return tokens, real, run(tokens), run(other)


@pytest.mark.parametrize("case", [*ALL_ROWS, "beyond the length"])
def test_padding_ends_its_document(case):
    """Documents are what they are alone, and tokens at padded places, which have no ids, move nothing."""
    tokens, real, packed, moved = unusual_rows()
    row = [*ALL_ROWS, "beyond the length"].index(case)
    for start, length in ALL_ROWS.get(case, BEYOND)[1]:
        ids = np.asarray(packed.block_ids[:, row, :, start : start + length])
        ids = np.where(ids >= 0, ids - start // SMALL.block_size, -1)
        alone = tokens[row, start : start + length]
        assert_equivalent(
            lively_model(small_config()), alone, ids, packed.logits[row, start : start + length], bucket=64
        )
    assert (np.asarray(packed.block_ids)[:, row, :, ~real[row]] == -1).all()
    assert np.isfinite(packed.logits[row]).all()
    np.testing.assert_array_equal(moved.logits[row, real[row]], packed.logits[row, real[row]])


@pytest.mark.parametrize("case", ALL_ROWS)
def test_documents_start_on_block_boundaries(case):
    segments = np.array([ALL_ROWS[case][0]])
    if case in UNUSUAL_ROWS:
        as_segment_ids(segments, (1, 64), SMALL.block_size)
        return
    where = MISALIGNED_ROWS[case][2]
    with pytest.raises(ValueError, match=rf"^segment_ids: every document must start on a multiple.* {where} of row 0"):
        as_segment_ids(segments, (1, 64), SMALL.block_size)


def test_segments_beyond_the_length_may_be_anything():
    as_segment_ids(np.array([BEYOND[0]]), (1, 64), SMALL.block_size, jnp.array([37], jnp.int32))


def test_gradients_do_not_reach_padding():
    """What stands at padded places moves no gradient of the layers either."""
    model = lively_model(small_config())
    segments = np.array([UNUSUAL_ROWS["padding in the middle"][0]], np.int32)
    real = segments >= 0

    @jax.jit
    @jax.grad
    def gradient(model, tokens):
        logits = nosa_jax.forward(model, tokens, segment_ids=segments).logits
        return jnp.sum(jnp.where(real[..., None], logits, 0) ** 2)

    tokens = random_tokens(1, 64)
    other = np.where(real, tokens, random_tokens(1, 64, seed=9))
    ours, theirs = (gradient(model, x).layers.attention for x in (tokens, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("variant", but_slow(VARIANTS, "infllmv2", "full"))
def test_causality_to_the_bit(variant):
    """Changing tokens after position i leaves outputs and block ids up to i as they were."""
    model = lively_model(small_config().with_attention(variant=variant))
    tokens = random_tokens(1, 400)
    before = forward(model, tokens, record=True)
    for i in (0, 15, 16, 100, 255, 398):
        changed = tokens.copy()
        changed[:, i + 1 :] = random_tokens(1, 400 - i - 1, seed=7)
        after = forward(model, changed, record=True)
        np.testing.assert_array_equal(after.hidden[:, : i + 1], before.hidden[:, : i + 1])
        np.testing.assert_array_equal(after.logits[:, : i + 1], before.logits[:, : i + 1])
        if variant != "full":
            np.testing.assert_array_equal(after.block_ids[..., : i + 1, :], before.block_ids[..., : i + 1, :])
        assert not np.array_equal(after.logits, before.logits)


@pytest.mark.slow
def test_state_after_forced_prefill_holds_the_forced_selection():
    """What replays in prefill is what the slots hold and what generation starts from."""
    model = lively_model(small_config())
    tokens = random_tokens(1, 200)
    forced = np.array([0, 1, 2, 3, 4, 10, 11, 12], np.int32)
    forced = np.broadcast_to(forced, (2, 1, 2, 1, 8))
    gen = nosa_jax.generate(model, tokens, max_new_tokens=1, forced_block_ids=forced, record=True)
    np.testing.assert_array_equal(gen.block_ids, forced)
    prompt = as_prompt(model, tokens, None)
    state, out = read_prompt(model, prompt, forced[:, :, :, 0], max_length=208, cache=CacheConfig(), limits=Limits(64))
    np.testing.assert_array_equal(state.table.blocks[..., :8], forced[:, :, :, 0])
    np.testing.assert_allclose(out.logits, gen.logits[:, 0], atol=TOLERANCE)
