"""Files that change places when a checkpoint is saved over another: whole moves or none, and what a writer leaves."""

from __future__ import annotations

import errno
import itertools
import os
import warnings
from pathlib import Path

import jax
import pytest
import tokenizers
from hf_folders import assert_same, contents, edit_config, make_model, raw_config, with_text

from nosa_jax.hf import ByteTokenizer, from_pretrained, load_tokenizer, save_pretrained, stop_tokens

MOVES = 11  # 7 shards, their index and config.json out, model.safetensors and config.json in


def failing_rename(fails, error: BaseException, failed: list[Path] | None = None):
    """A stand-in for Path.rename whose calls with these numbers fail. failed: gets where those would have moved to."""
    real, calls = Path.rename, itertools.count(1)

    def rename(self, target):
        if next(calls) in fails:
            if failed is not None:
                failed.append(target)
            raise error
        return real(self, target)

    return rename


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_pretrained(make_model(), tmp_path / "out", max_shard_bytes=9000)
    return tmp_path / "out"


def save_another(folder: Path) -> None:
    save_pretrained(jax.tree.map(lambda x: -x, make_model()), folder)


@pytest.mark.parametrize("fails_at", range(1, MOVES + 1))
def test_a_failed_move_is_taken_back(sharded, monkeypatch, fails_at):
    before = contents(sharded)
    error, failed = OSError(errno.EIO, "Input/output error"), []
    monkeypatch.setattr(Path, "rename", failing_rename({fails_at}, error, failed))
    with pytest.raises(OSError, match="Input/output error"):
        save_another(sharded)
    assert contents(sharded) == before
    assert (failed == [sharded / "config.json"]) == (fails_at == MOVES)  # which is the last move


@pytest.mark.parametrize("fails_at", [2, 3, 9, MOVES])
def test_a_second_interrupt_while_moves_are_taken_back_loses_nothing(sharded, monkeypatch, fails_at):
    before = contents(sharded)
    rename = failing_rename({fails_at, fails_at + 1}, KeyboardInterrupt())
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        save_another(sharded)
    assert contents(sharded) == before


@pytest.mark.parametrize("killed_at", range(2, MOVES + 1))
def test_what_a_killed_writer_had_moved_is_moved_back_by_the_next(sharded, monkeypatch, killed_at):
    """One that cannot take back anything leaves what one leaves that is killed."""
    (sharded / "notes.txt").write_text("mine")
    edit_config(sharded, eos_token_id=7)
    before = contents(sharded)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing_rename(range(killed_at, 10**6), OSError(errno.EIO, "disk")))
        with pytest.raises(OSError, match="disk"):
            save_another(sharded)
    assert not (sharded / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("nosa_jax.hf.save._write", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        with pytest.raises(OSError, match="No space left"):
            save_another(sharded)
    assert contents(sharded) == before
    save_another(sharded)
    assert_same(from_pretrained(sharded), jax.tree.map(lambda x: -x, make_model()))
    assert raw_config(sharded)["eos_token_id"] == 7
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_old_files_that_cannot_be_moved_back_stay(sharded, monkeypatch):
    before = {name: data for name, data in contents(sharded).items() if name != "config.json"}
    monkeypatch.setattr(Path, "rename", failing_rename(range(3, 10**6), OSError(errno.EIO, "disk")))
    for _ in range(2):
        with pytest.raises(OSError, match=r"disk|path: must be new, empty"):
            save_another(sharded)
        kept = [path for path in sharded.rglob("*") if path.is_file()]
        assert before.items() <= {path.name: path.read_bytes() for path in kept}.items()
        assert any(path.parent.name == "old" and path.name == "config.json" for path in kept)


@pytest.mark.parametrize("moved", [True, False])
def test_a_writer_that_ends_while_another_tidies_up_is_no_error(tmp_path, monkeypatch, moved):
    folder = tmp_path / "out"
    save_pretrained(make_model(), folder)
    other = folder / ".saving-other"
    other.mkdir()
    real = os.open

    def ends(path, *arguments, **options):
        if path == other and other.exists():
            other.rename(tmp_path / "elsewhere") if moved else other.rmdir()
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", ends)
    save_pretrained(make_model(), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


# --- a tokenizer in place of another --------------------------------------------------------------------------------


def another_tokenizer(folder: Path) -> None:
    """A tokenizer of words in place of the one that lies there, and more files of it."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "tokenizer.model"):
        (folder / name).write_text("{}")


@pytest.mark.parametrize("exists", [True, False])
def test_a_tokenizer_that_is_given_is_the_only_one(tmp_path, exists):
    model = from_pretrained(with_text(tmp_path / "in"))
    another_tokenizer(tmp_path / "in")
    target = tmp_path / "out"
    if exists:
        another_tokenizer(with_text(target))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(from_pretrained(tmp_path / "in"), target, tokenizer=ByteTokenizer())
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_tokenizer(target, 48).decode([97]) == "a"
    assert stop_tokens(target) == () and raw_config(target)["bos_token_id"] is None
    assert raw_config(target)["note"] == {"a": [1, None]}  # which says nothing of tokens
    save_pretrained(model, tmp_path / "same", tokenizer=ByteTokenizer())  # its own: the ids are the same tokens
    assert stop_tokens(tmp_path / "same") == (5,) and raw_config(tmp_path / "same")["bos_token_id"] == 1


def test_a_failed_save_gives_back_the_tokenizer_that_was_to_go(tmp_path, monkeypatch):
    folder = with_text(tmp_path / "in")
    another_tokenizer(folder)
    before, real = contents(folder), Path.rename

    def rename(self, target):
        if target == folder / "config.json":
            monkeypatch.setattr(Path, "rename", real)
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        save_pretrained(make_model(), folder, tokenizer=ByteTokenizer())
    assert contents(folder) == before
