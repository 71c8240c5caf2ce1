"""Corpora, windows and batches."""

import json

import numpy as np
import pytest

from nosa_jax.train import Corpus, find_files, heldout_batches, load_corpus, stdlib_files, train_batches


@pytest.fixture
def files(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([ord("a") + i]) * 100)
    return find_files(tmp_path)


def test_files_come_from_paths_folders_and_globs(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.py", "a/b/y.py", "a/b/z.txt", "a/.hidden"):
        (tmp_path / name).write_text(name)
    names = lambda *patterns: [path.name for path in find_files(*patterns)]
    assert names(tmp_path) == ["y.py", "z.txt", "x.py"]
    assert names(tmp_path / "a/x.py", f"{tmp_path}/**/*.py") == ["y.py", "x.py"]
    with pytest.raises(ValueError, match=r"patterns: must each find a file, got '.*\.rs'"):
        find_files(f"{tmp_path}/*.rs")


def test_the_standard_library_is_there_without_tests_and_packages():
    found = stdlib_files()
    assert found == sorted(found) and len(found) > 100
    assert any(path.name == "dataclasses.py" for path in found)
    assert not any({"test", "site-packages"} & set(path.parts) for path in found)


def test_whole_files_are_held_out_and_the_seed_decides_which(files):
    corpus = load_corpus(files, heldout_fraction=0.2, seed=1)
    train, heldout = set(corpus.train.tolist()), set(corpus.heldout.tolist())
    assert (len(train), len(heldout)) == (16, 4) and not train & heldout
    assert corpus.train.dtype == np.uint8 and len(corpus.train) == 1600
    again, other = (load_corpus(reversed(files), heldout_fraction=0.2, seed=seed) for seed in (1, 2))
    assert again.fingerprint() == corpus.fingerprint() != other.fingerprint()
    assert len(load_corpus(files, heldout_fraction=0.0).heldout) == 0


def test_bad_text_is_refused(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.write_bytes(b"")
    full.write_bytes(b"text")
    with pytest.raises(ValueError, match="files: must name at least one file"):
        load_corpus([])
    with pytest.raises(ValueError, match=r"files: must hold text, got .* with 0 bytes"):
        load_corpus([empty])
    with pytest.raises(ValueError, match=r"heldout_fraction: must lie between 0.0 and 0.9"):
        load_corpus([full], heldout_fraction=1.5)
    with pytest.raises(TypeError, match=r"Corpus.train: must be a NumPy array of integers, got float64"):
        Corpus(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"fill one window of length \+ 1 = 9, got 8"):
        train_batches(np.arange(8), batch_size=1, length=8, seed=0)


def test_an_epoch_predicts_every_token_once_and_the_next_one_is_shuffled_anew():
    batches = train_batches(np.arange(1 + 6 * 4), batch_size=2, length=4, seed=0)
    epochs = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == (6, 5) and epoch.dtype == np.int32
        assert sorted(epoch[:, 1:].ravel()) == list(range(1, 25))
        np.testing.assert_array_equal(np.diff(epoch), 1)
    assert not np.array_equal(*epochs)


def test_a_batch_may_be_one_window():
    assert next(train_batches(np.arange(100), batch_size=1, length=9, seed=0)).shape == (1, 10)


def test_batches_continue_from_a_json_state():
    def make(seed=0):
        return train_batches(np.arange(1000, dtype=np.uint16), batch_size=3, length=16, seed=seed)

    batches = make()
    for _ in range(25):  # beyond the first epoch
        next(batches)
    state = json.dumps(batches.get_state())
    expected = [next(batches) for _ in range(25)]
    resumed = make()
    resumed.set_state(json.loads(state))
    np.testing.assert_array_equal(expected, [next(resumed) for _ in range(25)])
    assert not np.array_equal(next(make()), next(make(seed=1)))


def test_heldout_batches_are_fixed_and_spread_over_the_text():
    tokens = np.arange(1001)
    batches = list(heldout_batches(tokens, batch_size=2, length=10, max_batches=3))
    starts = np.array(batches)[..., 0].ravel()
    assert [batch.shape for batch in batches] == [(2, 11)] * 3
    assert starts[0] == 0 and starts[-1] == 990 and len(set(starts)) == 6
    np.testing.assert_array_equal(batches, list(heldout_batches(tokens, batch_size=2, length=10, max_batches=3)))
    (only,) = heldout_batches(tokens[:31], batch_size=8, length=10, max_batches=3)
    assert only.shape == (3, 11)
