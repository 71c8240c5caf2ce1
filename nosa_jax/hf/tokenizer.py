"""Text to token ids and back: a checkpoint's own tokenizer.json, or plain bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from nosa_jax._extras import import_extra
from pallas_kernels.checks import bad_type, bad_value

Ids = Sequence[int] | np.ndarray | jax.Array


class FileTokenizer:
    """The tokenizer.json of a folder (or that file itself), run by the `tokenizers` package.

    Raises FileNotFoundError where there is none, ValueError for one that cannot be read, ImportError without the extra
    `hf`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"path: must be a tokenizer.json or a folder with one, got {file}, which does not exist. "
                "Copy it from the checkpoint; ByteTokenizer needs no file."
            )
        tokenizers = import_extra("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise bad_value(str(file), "must be a valid tokenizer.json", f"({error})", "Copy it again.") from error

    @property
    def vocab_size(self) -> int:
        """Added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the special tokens (a leading BOS, say) that tokenizer.json asks for."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Ids, *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`, a list or a one-dimensional array of ints."""
        return self._tokenizer.decode(_as_list(ids, self.vocab_size), skip_special_tokens=skip_special_tokens)


class ByteTokenizer:
    """Every UTF-8 byte is a token: vocabulary 256, no special tokens, no file. What `presets.tiny()` is built for."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Ids) -> str:
        """Text of `ids`, a list or a one-dimensional array of ints; bytes that are not UTF-8 become U+FFFD."""
        return bytes(_as_list(ids, self.vocab_size)).decode("utf-8", errors="replace")


def _as_list(ids: Ids, vocab_size: int) -> list[int]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise bad_value("ids", "must have one dimension", array.shape, "Decode one row at a time: decode(ids[0]).")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise bad_type("ids", "must hold integers", array.dtype, "Pass token ids.")
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        raise bad_value(
            "ids", f"must lie in [0, {vocab_size})", f"{array.min()} .. {array.max()}", "Drop padding before decoding."
        )
    return array.tolist()
