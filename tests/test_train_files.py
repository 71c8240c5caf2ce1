"""What of a user's files becomes text: which share is held out, each file once, and no binary files."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from nosa_jax.train import find_files, load_corpus, read_text, text


def write(path: Path, size: int, seed: int = 0) -> Path:
    """Lines of random letters, `size` bytes."""
    text = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, size).astype(np.uint8)
    text[39::40] = ord("\n")
    path.write_bytes(text.tobytes())
    return path


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
@pytest.mark.parametrize(
    "sizes",
    [[3_000_000, 20_000], [20_000, 3_000_000], [50_000], [1000] * 7, [10, 400_000, 300], [10_000, 9_999]],
    ids=str,
)
def test_the_share_held_out_is_close_to_the_one_asked_for(tmp_path, sizes, fraction):
    files = [write(tmp_path / f"{i}.txt", size, seed=i) for i, size in enumerate(sizes)]
    for seed in range(4):
        corpus = load_corpus(files, heldout_fraction=fraction, seed=seed)
        assert len(corpus.train) + len(corpus.heldout) == sum(sizes)
        assert len(corpus.heldout) / sum(sizes) == pytest.approx(fraction, rel=0.2)
        assert load_corpus(files, heldout_fraction=fraction, seed=seed).fingerprint() == corpus.fingerprint()


def test_files_stay_whole_where_that_gives_the_share(tmp_path):
    files = [write(tmp_path / f"{i:02}.txt", 100, seed=i) for i in range(40)]
    heldout = load_corpus(files, heldout_fraction=0.1).heldout.tobytes()
    assert sum(file.read_bytes() in heldout for file in files) == 4 and len(heldout) == 400


def test_a_file_is_split_at_the_end_of_a_line(tmp_path):
    corpus = load_corpus([write(tmp_path / "a.txt", 10_000)], heldout_fraction=0.1)
    text = (tmp_path / "a.txt").read_bytes()
    assert corpus.train.tobytes() + corpus.heldout.tobytes() == text
    assert corpus.train[-1] == ord("\n") and len(corpus.heldout) <= 1000


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^files: must exist, got '.*nope'\. Check the path"):
        text([tmp_path / "nope"], progress=False)


def test_a_file_of_many_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = write(tmp_path / "a.txt", 1000)
    (tmp_path / "b.txt").symlink_to(real)
    os.link(real, tmp_path / "c.txt")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "d.txt", 500, seed=1)
    for name in ("itself", "again", "sub/up"):
        (tmp_path / name).symlink_to(tmp_path)
    for patterns in (["."], [tmp_path, "a.txt"], ["*.txt", "**/*.txt"], ["**"], ["sub", "sub/../a.txt", real]):
        assert sorted(path.name for path in find_files(*patterns)) == ["a.txt", "d.txt"], patterns
    files = ["a.txt", real, "b.txt", "sub/../a.txt", "c.txt", "sub/d.txt"]
    corpus = load_corpus(files, heldout_fraction=0.2)
    assert len(corpus.train) + len(corpus.heldout) == 1500


@pytest.mark.parametrize("pattern", ["**/*.py", "a/**", "a/**/y.py", "**/b/*", "a/*/y.py", "./a/../**/y.py"])
def test_globs_find_what_the_standard_library_finds(tmp_path, monkeypatch, pattern):
    import glob

    monkeypatch.chdir(tmp_path)
    for name in ("x.py", "a/x.py", "a/b/y.py", "a/b/z.txt", "a/.hidden/y.py", "a/.y.py", "c[1]/d/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = {os.path.realpath(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}
    assert {os.path.realpath(path) for path in find_files(pattern)} == expected
    assert len(find_files("c[1]")) == len(find_files("c[[]1]/**")) == 1


@pytest.mark.parametrize(
    "binary",
    [
        b"\x1f\x8b\x08\x08" + bytes(range(1, 200)) * 4,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100),
        b"text, then a table\0\0\0\1 of numbers",
        b"BZh91AY&SY" + bytes(range(1, 250)),
    ],
    ids=["gzip", "png", "table", "bzip2"],
)
def test_binary_files_are_skipped_with_a_word(tmp_path, binary):
    text = write(tmp_path / "a.txt", 1000)
    (tmp_path / "b").write_bytes(binary)
    with pytest.warns(UserWarning, match=rf"skipped 1 file that is not text: .*{tmp_path.name}/b"):
        corpus = load_corpus(find_files(tmp_path), heldout_fraction=0.1)
    assert corpus.train.tobytes() + corpus.heldout.tobytes() == text.read_bytes()
    with pytest.raises(ValueError, match=r"files: must hold text, got 1 .* not text"):
        load_corpus([tmp_path / "b"])
    with pytest.raises(ValueError, match=r"text: must be a text file, got .*/b, which is binary"):
        read_text(tmp_path / "b", argument="text")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_with_zero_bytes_counts_as_binary(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("a text", encoding=encoding)
    with pytest.raises(ValueError, match=r"path: must be a text file, got .*which is binary"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "gb18030"])
def test_text_of_any_encoding_is_read_byte_by_byte(tmp_path, encoding):
    content = "\ufeffGrüße, 你好, naïve\r\n\ttab\f\x1b[0m\x08\a".encode(encoding, errors="ignore") * 3
    (tmp_path / "a.txt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = load_corpus([tmp_path / "a.txt"], heldout_fraction=0.0)
    assert corpus.train.tobytes() == content == read_text(tmp_path / "a.txt").tobytes()


def test_what_a_run_wrote_is_no_text(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "tiny"
    checkpoint = ("checkpoints/5/_CHECKPOINT_METADATA", "checkpoints/5/meta")
    for name in ("log.jsonl", *checkpoint, "model/config.json", "training.png", "not_finite-3-0.npz", "notes"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (tmp_path / "saved" / "7").mkdir(parents=True)
    (tmp_path / "saved" / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("a text like any other")
    for pattern in (tmp_path, f"{tmp_path}/**/*", f"{tmp_path}/**"):
        with pytest.warns(UserWarning, match=r"skipped what a training run wrote: .*tiny/checkpoints"):
            found = find_files(pattern)
        assert [path.name for path in found] == ["a.txt", "notes"]
    for pattern in (run, f"{run}/*", f"{tmp_path}/runs/*/*", f"{run}/../tiny/notes"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [path.name for path in find_files(pattern)] == ["notes"], pattern
    only = (f"{run}/checkpoints/5", f"{tmp_path}/runs/*/*.jsonl", f"{run}/checkpoints/*/*", f"{run}/model", "log.jsonl")
    monkeypatch.chdir(run)
    for pattern in only:
        with pytest.raises(ValueError, match=r"patterns: must each find a file, got .*only what a training run wrote"):
            find_files(pattern)
    monkeypatch.chdir(run / "checkpoints" / "5")
    with pytest.raises(ValueError, match="only what a training run wrote"):
        find_files("*")


def when_entered(monkeypatch, folder, action):
    """Calls `action` just before the folder is listed."""
    scandir = os.scandir

    def listed(path):
        if Path(path) == folder:
            action()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", 100)
    locked = tmp_path / "locked"
    locked.mkdir()

    def refuse():
        raise PermissionError(13, "Permission denied", str(locked))

    when_entered(monkeypatch, locked, refuse)
    with pytest.raises(PermissionError, match="locked"):
        find_files(tmp_path)


def test_a_folder_that_a_run_just_renamed_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", 100)
    gone = tmp_path / "6.orbax-checkpoint-tmp"
    gone.mkdir()
    when_entered(monkeypatch, gone, gone.rmdir)
    assert find_files(tmp_path) == [tmp_path / "a.txt"]


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", 100)
    assert find_files("~/a.txt") == find_files("~/*.txt") == [tmp_path / "a.txt"]
    assert len(load_corpus(["~/a.txt"], heldout_fraction=0.0).train) == 100
