"""Corpora and the files that they are read from."""

import numpy as np
import pytest

from nosa_jax.train import Corpus, find_files, load_corpus, stdlib_files


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
    with pytest.raises(ValueError, match=r"Corpus.train: must fill one window of length \+ 1 = 9 tokens, got 8 tokens"):
        Corpus(np.arange(8), np.arange(8)).source(8)
