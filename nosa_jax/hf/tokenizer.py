"""Text to token ids and back: a checkpoint's own tokenizer.json, or plain bytes."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence

import jax
import numpy as np

from nosa_jax._extras import import_extra
from nosa_jax._json import refuse_pointer
from nosa_jax._paths import user_path
from pallas_kernels.checks import bad_type, bad_value

Ids = Sequence[int] | np.ndarray | jax.Array
_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")


class FileTokenizer:
    """The tokenizer.json of a folder (or that file itself), run by the `tokenizers` package.

    Truncation, padding and dropout that the file asks for are off: a prompt is encoded whole and the same every time.

    Raises FileNotFoundError where there is none, ValueError for one that cannot be read, ImportError without the extra
    `hf`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = user_path("path", path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"path: must be a tokenizer.json or a folder with one, got {file}, which does not exist. "
                "Copy it from the checkpoint; ByteTokenizer needs no file."
            )
        self._read(file.read_bytes(), str(file))

    @classmethod
    def from_json(cls, data: bytes, source: str = "tokenizer.json") -> FileTokenizer:
        """The tokenizer of a tokenizer.json with this content. source: the file, for messages; errors as for a path."""
        tokenizer = cls.__new__(cls)
        tokenizer._read(data, source)
        return tokenizer

    def _read(self, data: bytes, source: str) -> None:
        tokenizers = import_extra("tokenizers")
        refuse_pointer(source, data)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data.removeprefix(codecs.BOM_UTF8))
        except Exception as error:  # the package raises bare Exception
            raise bad_value(source, "must be a valid tokenizer.json", f"({error})", "Copy it again.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1
        self.fallback_ids = frozenset(i for token, i in vocabulary.items() if _FALLBACK.fullmatch(token))

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, added tokens included; an id in between may have no token."""
        return self._size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the special tokens (a leading BOS, say) that tokenizer.json asks for."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text as `encode` gives them, by all cores."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Of each text its token ids, with none added to it, and where the characters of each token start and stop,
        ints [N, 2]; by all cores."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)) for encoding in found]

    def decode(self, ids: Ids, *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`, a list or a one-dimensional array of ints.

        Ids without a token, which a model with a larger vocabulary may choose, have no text.
        """
        known = [i for i in _as_list(ids) if i < self._size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)


class ByteTokenizer:
    """Every UTF-8 byte is a token: vocabulary 256, no special tokens, no file. What `presets.tiny()` is built for."""

    vocab_size = 256
    fallback_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """The UTF-8 bytes of each text, and of each byte where its character starts and stops, ints [N, 2]."""
        return [(self.encode(text), self._spans(text)) for text in texts]

    @staticmethod
    def _spans(text: str) -> np.ndarray:
        code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + sum((code >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
        starts = np.repeat(np.arange(len(text)), sizes)
        return np.stack([starts, starts + 1], axis=1)

    def decode(self, ids: Ids) -> str:
        """Text of `ids`, a list or a one-dimensional array of ints; what is not UTF-8, or no byte, becomes U+FFFD."""
        # 0xFF is never a part of UTF-8.
        return bytes(min(i, 0xFF) for i in _as_list(ids)).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The content of a tokenizer.json with these tokens, for models of any vocabulary. Needs the extra `hf`."""
        tokenizers = import_extra("tokenizers")
        # The pre-tokenizer writes printable bytes as themselves and the others, in order, as what follows U+00FF.
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in visible]
        letters = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return tokenizer.to_str(pretty=True)


def _as_list(ids: Ids) -> list[int]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise bad_value("ids", "must have one dimension", array.shape, "Decode one row at a time: decode(ids[0]).")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise bad_type("ids", "must hold integers", array.dtype, "Pass token ids.")
    if array.size and not 0 <= array.min() <= array.max() < 2**31:
        raise bad_value(
            "ids", "must lie in [0, 2**31)", f"{array.min()} .. {array.max()}", "Drop padding before decoding."
        )
    return array.tolist()
