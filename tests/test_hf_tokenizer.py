"""Tokenizers: a file of a checkpoint and plain bytes, with the same two methods."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nosa_jax._extras import import_extra
from nosa_jax.hf import ByteTokenizer, FileTokenizer, from_pretrained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A word-level tokenizer.json that puts <s> in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_file_tokenizer(folder, name):
    tokenizer = FileTokenizer(folder / name)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("a b zebra") == [0, 1, 2, 3]
    assert tokenizer.encode("a b", add_special_tokens=False) == [1, 2]
    assert tokenizer.decode([0, 1, 2]) == "a b"
    assert tokenizer.decode(jnp.array([0, 1]), skip_special_tokens=False) == "<s> a"


@given(st.text())
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.asarray(ids, np.int32)) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_half_a_character_still_decodes():
    assert ByteTokenizer().decode(ByteTokenizer().encode("é")[:1]) == "\ufffd"
    assert ByteTokenizer().decode([]) == ""


def test_bad_ids(folder):
    for tokenizer in (ByteTokenizer(), FileTokenizer(folder)):
        with pytest.raises(ValueError, match=r"ids: must lie in \[0, .*-1 \.\. 2"):
            tokenizer.decode([2, -1])
        with pytest.raises(ValueError, match="ids: must have one dimension"):
            tokenizer.decode(np.zeros((2, 3), np.int32))
        with pytest.raises(TypeError, match="ids: must hold integers"):
            tokenizer.decode(np.zeros(3))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*does not exist"):
        FileTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be a valid tokenizer\.json"):
        FileTokenizer(tmp_path)


def test_a_broken_package_is_not_called_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "tqdm.py").write_text("import no_such_part_of_tqdm")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_part_of_tqdm'$"):
        import_extra("tqdm")
    (tmp_path / "tqdm.py").write_text("raise ImportError('libtqdm.so: cannot open shared object file')")
    with pytest.raises(ImportError, match=r"^libtqdm\.so"):
        import_extra("tqdm")


def test_a_missing_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'tokenizers is needed.*pip install "nosa-jax\[hf\]"'):
        FileTokenizer(folder)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'safetensors is needed.*pip install "nosa-jax\[hf\]"'):
        from_pretrained(Path(__file__).parent / "golden/models/tiny_g4")
