"""Sources of training data that are refused, with what is wrong and where."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from sources import made, read, write_lines, write_texts, write_tokenizer

from nosa_jax import train
from nosa_jax.train import Corpus, check_vocabulary, mixture


@pytest.fixture
def files(tmp_path):
    return write_texts(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path, folder):
    path = write_lines(tmp_path / "a", [{"text": "one"}])
    source = train.jsonl([path], folder, length=64, heldout_fraction=0.0)
    check_vocabulary(source, 7)
    with pytest.raises(ValueError, match="source: must hold token ids below vocab_size = 6, got ids below 7"):
        check_vocabulary(source, 6)
    check_vocabulary(made(), 1500)
    with pytest.raises(ValueError, match="below vocab_size = 1499"):
        check_vocabulary(made(), 1499)


def test_text_that_is_no_utf8_is_refused_where_it_must_be(tmp_path, folder):
    path = tmp_path / "latin"
    path.write_bytes("abc é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin: must be UTF-8 for a tokenizer, got byte 0xe9 at byte 4\."):
        train.text([path], folder)
    assert read(train.text([path], length=64, heldout_fraction=0.0)) == [list(path.read_bytes())]


def test_empty_and_binary_files_are_skipped(tmp_path, files):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(100))
    with pytest.warns(UserWarning) as warned:
        source = train.text([*files, tmp_path / "empty.txt", tmp_path / "binary.txt"], length=64)
    messages = sorted(str(warning.message) for warning in warned)
    assert [message.partition(":")[0] for message in messages] == [
        "skipped 1 file that is empty",
        "skipped 1 file that is not text",
    ]
    assert source.fingerprint() == train.text(files, length=64).fingerprint()
    with pytest.raises(ValueError, match="files: must hold text, got 1 that are not text and 1 that are empty"):
        train.text([tmp_path / "empty.txt", tmp_path / "binary.txt"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "one"', r":2: must be one JSON object, got \("),
        (b"[1]", ":2: must be one JSON object, got list"),
        (b'{"text": 3}', ":2: must hold text under 'text', got int 3"),
        (b'{"other": "x"}', r":2: must hold text under 'text', got fields \['other'\]"),
        (b'{"text": "\xff"}', ":2: must be UTF-8, got byte 0xff at byte 10 of the line"),
        (rb'{"text": "\ud800"}', r":2: must hold text without single surrogates, got U\+D800 at character 0"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl" + message):
        train.jsonl([tmp_path / "a.jsonl"])


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "fine"}\n' * 1000)
    (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.gz: must be a whole gzip file"):
        train.jsonl([tmp_path / "a.gz"])
    (tmp_path / "b.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"b\.jsonl: must be the file itself, got a pointer of Git LFS"):
        train.jsonl([tmp_path / "b.jsonl"])
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"c\.npy: must be a whole \.npy file"):
        train.tokens([tmp_path / "c.npy"])
    (tmp_path / "d.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"d\.bin: must hold whole numbers of 2 bytes each, got 5 bytes"):
        train.tokens([tmp_path / "d.bin"])


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros(3), TypeError, "must hold integers, got float64"),
        (np.zeros((2, 2), int), ValueError, r"must have one dimension, got \(2, 2\)"),
        (np.array([3, -1, 4]), ValueError, "must hold token ids of at least 0, got -1"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path, array, error, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(error, match=rf"a\.npy: {message}"):
        train.tokens([tmp_path / "a.npy"])


def test_other_files_and_empty_shards(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"files: must be '.npy' or '.bin', got '.txt'"):
        train.tokens([tmp_path / "a.txt"])
    np.save(tmp_path / "a.npy", np.arange(100))
    np.save(tmp_path / "b.npy", np.arange(0))
    (tmp_path / "c.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 2 files that are empty"):
        assert train.tokens([tmp_path / f"{name}" for name in ("a.npy", "b.npy", "c.bin")]).vocab_size == 100
    with pytest.raises(ValueError, match="files: must hold text, got 1 that are empty"):
        train.tokens([tmp_path / "b.npy"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: must be >= 1"),
        ({"length": 100}, r"length: must be a multiple of block_size = 64 to pack, got 100\. Use 64, or pack=False"),
        ({"block_size": 0}, "block_size: must be >= 1"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction: must lie between 0\.0 and 0\.9"),
        ({"heldout_seed": -1}, "heldout_seed: must be >= 0"),
        ({"end_of_text": -1}, "end_of_text: must be >= 0"),
        ({"length": 4096, "pack": False}, r"files: must fill one window of length \+ 1 = 4097 tokens, got \d+ tokens"),
    ],
)
def test_options_out_of_range_are_refused(files, options, message):
    with pytest.raises(ValueError, match=message):
        train.text(files, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be >= 1"),
        ({"batch_size": 1, "seed": 2**32}, "seed: must be <= 4294967295"),
        ({"batch_size": 1, "seed": -1}, "seed: must be >= 0"),
        ({"batch_size": 1, "shard": (2, 2)}, r"shard\[0\]: must be <= 1, got 2"),
        ({"batch_size": 1, "shard": (-1, 2)}, r"shard\[0\]: must be >= 0"),
        ({"batch_size": 1, "shard": (0, 0)}, r"shard\[1\]: must be >= 1"),
    ],
)
def test_batches_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made().batches(**options)


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}, {"next_index": True}, None])
def test_positions_that_are_none_are_refused(without_type_checker, state):
    with pytest.raises(ValueError, match="state: must be what get_state returned"):
        made().batches(1).set_state(state)


def test_a_position_in_an_older_order_is_refused():
    with pytest.raises(ValueError, match=r"state: must be a position .*, order 2, got a position in order 1"):
        made().batches(1).set_state({"next_index": 3})


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, "parts: must hold at least one source"),
        ([(made(), 0)], ValueError, r"parts\[0\]\[1\]: must be positive, got 0"),
        ([(made(), 1), (made(), -1)], ValueError, r"parts\[1\]\[1\]: must be >= 0.0 and finite, got -1"),
        ([(made(), 1), (made(), float("nan"))], ValueError, r"parts\[1\]\[1\]: must be >= 0.0 and finite, got nan"),
        ([(made(), 1), (made(length=16), 1)], ValueError, r"parts\[1\]\[0\]: must have rows of 8 tokens .* got 16"),
        ([made()], TypeError, r"parts\[0\]: must be \(source, weight\)"),
        ([("text", 1)], TypeError, r"parts\[0\]\[0\]: must be a source of this package, got str"),
    ],
)
def test_mixtures_that_are_none_are_refused(without_type_checker, parts, error, message):
    with pytest.raises(error, match=message):
        mixture(parts)


def test_other_arguments_of_a_wrong_kind_are_refused(without_type_checker, tmp_path, files):
    with pytest.raises(TypeError, match="files: must be a sequence of paths"):
        train.text(str(files[0]))
    with pytest.raises(ValueError, match="files: must name at least one file"):
        train.text([])
    with pytest.raises(TypeError, match=r"tokenizer: must be a path or a tokenizer of nosa_jax\.hf, got int"):
        train.text(files, 3)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        train.text(files, tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"shard: must be \(index, count\), got 3"):
        made().batches(1, shard=3)
    with pytest.raises(ValueError, match=r"Corpus\.heldout: must hold token ids of at least 0, got -1"):
        Corpus(np.arange(9), np.array([-1])).source(4)
