"""Sources: what is read from files, the order of batches, positions, shards, mixtures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import TEXTS, documents, made, read, write_lines, write_texts, write_tokenizer

from nosa_jax import train
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from nosa_jax.train import Batch, Corpus, Source, mixture
from nosa_jax.train.data import heldout_bytes_per_token


@pytest.fixture
def files(tmp_path):
    return write_texts(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def assert_same(a, b):
    for name in ("tokens", "targets", "mask", "segment_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# --- what is read -------------------------------------------------------------------------------------------------


def test_text_is_one_document_per_file(files):
    source = train.text(files, length=64, block_size=16, heldout_fraction=0.2)
    assert sorted(bytes(document).decode() for document in read(source)) == sorted(TEXTS)
    held_out = documents(source.heldout(2))
    assert 0.15 < sum(map(len, held_out)) / sum(map(len, TEXTS)) < 0.25
    assert source.bytes_per_token == 1 and source.vocab_size == ord("z") + 1
    assert isinstance(source, Source)
    batch = next(source.batches(3))
    assert isinstance(batch, Batch)
    kinds = [(array.shape, array.dtype) for array in (batch.tokens, batch.targets, batch.mask, batch.segment_ids)]
    assert kinds == [((3, 64), np.dtype(kind)) for kind in ("int32", "int32", "bool", "int32")]


def test_windows_are_those_of_all_text(files):
    source = train.text(files, length=16, pack=False, heldout_fraction=0.0)
    rows = [next(source.batches(1, seed=seed)) for seed in range(20)]
    text = "".join(TEXTS).encode()
    for row in rows:
        assert row.mask is None and row.segment_ids is None
        assert bytes(row.tokens[0].tolist() + row.targets[0, -1:].tolist()) in text
        np.testing.assert_array_equal(row.targets[0, :-1], row.tokens[0, 1:])
    assert list(source.heldout(2)) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_one_document_each(tmp_path, name):
    path = write_lines(tmp_path / name, [{"body": text, "n": 1} for text in TEXTS])
    source = train.jsonl([path], length=64, block_size=16, field="body", heldout_fraction=0.0)
    assert sorted(bytes(document).decode() for document in read(source)) == sorted(TEXTS)


def test_json_lines_may_have_empty_lines_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": ""}\n{"text": "two"}')
    with pytest.warns(UserWarning, match=r"skipped 1 lines without text, the first at .*a:3"):
        source = train.jsonl([tmp_path / "a"], length=64, heldout_fraction=0.0)
    assert sorted(map(bytes, read(source))) == [b"one", b"two"]


@pytest.mark.parametrize("named", [lambda folder: folder, lambda folder: folder / "tokenizer.json", FileTokenizer])
def test_text_goes_through_a_tokenizer(tmp_path, folder, named):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three four"}])
    source = train.jsonl([path], named(folder), length=8, block_size=4, heldout_fraction=0.0)
    assert sorted(read(source)) == [[0, 3, 4], [0, 5, 2]]
    assert source.vocab_size == 7 and source.bytes_per_token == len("one twothree four") / 6
    source = train.jsonl([path], named(folder), length=8, block_size=4, heldout_fraction=0.0, end_of_text=9)
    assert sorted(read(source)) == [[0, 3, 4, 9], [0, 5, 2, 9]] and source.vocab_size == 10


def test_the_folder_says_how_documents_end(tmp_path, folder):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "one </s>"}])
    found = lambda: sorted(read(train.jsonl([path], folder, length=8, block_size=4, heldout_fraction=0.0)))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert found() == [[0, 3, 1], [0, 3, 4, 1]]  # once, where it was there before
    (folder / "config.json").write_text('{"eos_token_id": 6}')
    assert found() == [[0, 3, 1, 6], [0, 3, 4, 6]]
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 6]}')
    assert found() == [[0, 3, 1], [0, 3, 4, 1]]


def test_bytes_may_end_documents_too(files):
    source = train.text(files, length=64, end_of_text=256, tokenizer=ByteTokenizer(), heldout_fraction=0.0)
    assert all(document[-1] == 256 and 256 not in document[:-1] for document in read(source))
    assert source.vocab_size == 257


@pytest.mark.parametrize("name, dtype", [("a.npy", "int64"), ("a.bin", "uint16"), ("a.bin", "uint32")])
def test_shards_of_tokens(tmp_path, name, dtype):
    parts = [np.array([7, 8, 0, 9, 0, 5], dtype), np.array([300, 0], dtype)]
    for n, part in enumerate(parts):
        path = tmp_path / f"{n}{name}"
        np.save(path, part) if path.suffix == ".npy" else part.tofile(path)
    options = {"length": 8, "block_size": 2, "heldout_fraction": 0.0, "bytes_per_token": 3.5}
    if dtype != "int64":
        options["dtype"] = dtype
    source = train.tokens(tmp_path.iterdir(), end_of_document=0, **options)
    assert sorted(read(source)) == [[5], [7, 8, 0], [9, 0], [300, 0]]
    assert source.vocab_size == 301 and source.bytes_per_token == 3.5
    whole = train.tokens(tmp_path.iterdir(), **options)
    assert sorted(read(whole)) == [part.tolist() for part in parts]
    assert whole.fingerprint() != source.fingerprint()


def test_a_corpus_is_a_source_of_its_windows():
    corpus = Corpus(np.arange(1000, dtype=np.uint16), np.arange(2000, 2051), bytes_per_token=4.0)
    source = corpus.source(16)
    batches = source.batches(2, seed=5)
    for _ in range(2):  # every token is a target once in an epoch, but for the rest that fills no window
        epoch = [next(batches) for _ in range(62 // 2)]
        targets = np.concatenate([batch.targets.ravel() for batch in epoch])
        assert targets.dtype == np.int32 and sorted(targets) == list(range(1, 62 * 16 + 1))
        assert all((batch.targets == batch.tokens + 1).all() for batch in epoch)
    assert (source.fingerprint(), source.bytes_per_token, source.vocab_size) == (corpus.fingerprint(), 4.0, 2051)
    assert (source.train_tokens, source.heldout_tokens) == (1000, 51)
    (held_out,) = source.heldout(8)
    assert held_out.targets[held_out.mask].tolist() == list(range(2001, 2051))


# --- batches ------------------------------------------------------------------------------------------------------


def mixed():
    return mixture([(made(), 2), (made(400, first=2000, pack=False), 1), (made(200, 6, first=4000, masked=True), 0.5)])


SOURCES = {"packed": made, "windows": lambda: made(pack=False), "masked": lambda: made(masked=True), "mixture": mixed}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@settings(max_examples=10)
@given(batch_size=st.integers(1, 5), before=st.integers(0, 20), seed=st.integers(0, 2**32 - 1))
def test_a_position_leads_to_exactly_the_next_batch(make, batch_size, before, seed):
    batches = make().batches(batch_size, seed)
    for _ in range(before):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    assert len(json.dumps(state)) < 100
    resumed = make().batches(batch_size, seed)
    next(resumed)
    resumed.set_state(state)
    for _ in range(3):
        assert_same(next(batches), next(resumed))


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@settings(max_examples=10)
@given(rows=st.integers(1, 3), count=st.sampled_from([2, 4]), seed=st.integers(0, 9))
def test_processes_together_see_what_one_sees(make, rows, count, seed):
    whole = make().batches(rows * count, seed)
    parts = [make().batches(rows, seed, shard=(index, count)) for index in range(count)]
    for _ in range(6):
        together, seen = next(whole), [next(part) for part in parts]
        for name in ("tokens", "targets", "mask", "segment_ids"):
            wanted = getattr(together, name)
            found = [getattr(batch, name) for batch in seen]
            if wanted is None:
                assert found == [None] * count
            else:
                np.testing.assert_array_equal(np.concatenate(found), wanted)
    # So a run goes on with another number of processes.
    assert parts[0].get_state() == whole.get_state()


def test_an_epoch_has_every_row_once_and_the_next_has_another_order():
    source = made(count=20, size=7)
    rows = 20  # a row each
    batches = source.batches(4)
    epochs = [[tuple(row) for _ in range(rows // 4) for row in next(batches).tokens] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == rows
    same = made(count=20, size=7).batches(4)
    assert [tuple(row) for _ in range(rows // 4) for row in next(same).tokens] == epochs[0]


@pytest.mark.parametrize("make", [lambda: made(count=20, size=7), lambda: mixture([(made(count=20, size=7), 1)])])
def test_no_two_epochs_of_any_seeds_have_one_order(make):
    batches = [make().batches(20, seed) for seed in range(4)]
    epochs = {tuple(next(each).tokens[:, 0].tolist()) for each in batches for _ in range(4)}
    assert len(epochs) == 16


def test_the_order_of_a_seed_stays_what_it_is():
    """A change of it breaks runs that are to resume: it must count `data.batch.ORDER` up, which positions name."""
    batches = made(count=10, size=7).batches(10, seed=3)
    orders = [(next(batches).tokens[:, 0] // 7).tolist() for _ in range(2)]
    assert orders == [[4, 7, 6, 2, 3, 5, 9, 0, 1, 8], [5, 8, 1, 6, 2, 7, 9, 4, 0, 3]]
    assert batches.get_state() == {"next_index": 2, "order": 2}


def test_weights_are_shares_of_rows_at_any_point():
    source = mixture([(made(70), 3), (made(80, first=1000), 1)])
    batches = source.batches(4)
    for _ in range(100):  # beyond an epoch of either
        origin = next(batches).tokens[:, 0] >= 1000
        assert origin.sum() == 1
    nested = mixture([(source, 1), (made(70, first=2000), 1)])
    drawn = np.concatenate([next(b).tokens[:, 0] for b in [nested.batches(40)] for _ in range(10)])
    shares = np.bincount(np.digitize(drawn, [1000, 2000])) / len(drawn)
    np.testing.assert_allclose(shares, [0.375, 0.125, 0.5], atol=0.02)


def test_a_mixture_has_the_arrays_of_all_its_sources():
    batches = mixed().batches(2)
    for _ in range(10):
        batch = next(batches)
        windows = (batch.tokens[:, 0] >= 2000) & (batch.tokens[:, 0] < 4000)
        assert batch.mask[windows].all() and (batch.segment_ids[windows] == 0).all()
    plain = mixture([(made(pack=False), 1), (made(pack=False, first=1500), 1)])
    assert next(plain.batches(2)).mask is None
    assert plain.vocab_size == 3000 and plain.bytes_per_token == 1 and plain.train_tokens == 3000


def test_sources_of_a_mixture_are_shuffled_apart():
    batches = mixture([(made(40, 8), 1), (made(40, 8, first=1000), 1)]).batches(80)
    tokens = next(batches).tokens[:, 0]
    assert not np.array_equal(tokens[tokens < 1000], tokens[tokens >= 1000] - 1000)


# --- held out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_what_is_held_out_is_the_same_every_time_and_never_trained_on(pack):
    source = made(40, 7, 16, pack=pack, heldout_fraction=0.2)
    found = list(source.heldout(3))
    for batch, again in zip(found, source.heldout(3), strict=True):
        assert batch.tokens.shape == batch.mask.shape == (3, 16)
        assert_same(batch, again)
    targets = np.concatenate([batch.targets[batch.mask] for batch in found])
    assert (
        len(targets)
        == len(set(targets.tolist()))
        == source.heldout_tokens - (source.heldout_tokens // 7 if pack else 1)
    )
    batches = source.batches(4)
    trained = np.concatenate([next(batches).tokens.ravel() for _ in range(30)])
    assert set(targets.tolist()).isdisjoint(trained[trained > 0].tolist())


def test_fewer_batches_are_spread_over_what_is_held_out():
    source = made(200, 8, 8, heldout_fraction=0.5)
    starts = lambda **options: np.concatenate([batch.tokens[:, 0] for batch in source.heldout(4, **options)])
    everything, some = starts(), starts(max_batches=3)
    assert len(everything) == 100 and len(some) == 12
    place = [everything.tolist().index(start) for start in some]
    assert place[0] == 0 and place[-1] == 99 and max(np.diff(place)) == 9
    assert starts(max_batches=1000).tolist() == everything.tolist()


def test_processes_share_what_is_held_out():
    source = made(50, 7, 8, heldout_fraction=0.3)
    whole = list(source.heldout(4))
    halves = [list(source.heldout(2, shard=(index, 2))) for index in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), batch.tokens)
        np.testing.assert_array_equal(np.concatenate([part.mask for part in parts]), batch.mask)


def test_a_mixture_holds_out_what_its_sources_do():
    parts = [made(20, heldout_fraction=0.2), made(20, first=500, pack=False, heldout_fraction=0.2)]
    found = list(mixture([(part, 1) for part in parts]).heldout(2))
    count = lambda batches: sum(int(batch.mask.sum()) for batch in batches)
    assert count(found) == sum(count(part.heldout(2)) for part in parts)
    assert all(batch.segment_ids is not None for batch in found)


def test_bits_per_byte_of_a_mixture_are_those_of_what_is_held_out():
    """Two sources trained on alike, one of which holds out half as much, and learns every other token of it."""
    plain, answers = made(40, heldout_fraction=0.4), made(40, masked=True, heldout_fraction=0.2)
    plain.bytes_per_token, answers.bytes_per_token = 2.0, 6.0
    source = mixture([(mixture([(plain, 1)]), 1), (answers, 1)])
    assert source.bytes_per_token == 4.0 and (plain.heldout_targets, answers.heldout_targets) == (80, 20)
    assert heldout_bytes_per_token(source) == pytest.approx((80 * 2 + 20 * 6) / 100)
    assert heldout_bytes_per_token(plain) == 2.0
    assert heldout_bytes_per_token(mixture([(made(), 1)])) == 1.0  # nothing is held out


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_fingerprints_tell_what_would_be_read(files):
    base = {"length": 64, "block_size": 16, "heldout_fraction": 0.2}
    changes = [{}, {"length": 128}, {"block_size": 32}, {"pack": False}, {"heldout_fraction": 0.4}, {"heldout_seed": 2}]
    prints = [train.text(files, **(base | change)).fingerprint() for change in changes]
    assert len(set(prints)) == len(changes)
    assert train.text(reversed(files), **base).fingerprint() == prints[0]
    files[3].write_text(TEXTS[3].replace("y", "z"))
    assert train.text(files, **base).fingerprint() not in prints
    shares = [mixture([(made(), 1), (made(5), weight)]).fingerprint() for weight in (1, 2)]
    assert shares[0] != shares[1] and max(map(len, [*prints, *shares])) < 60
