"""Text of documents to token ids, once, when a source is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from nosa_jax._extras import import_extra
from nosa_jax._json import parse_object
from nosa_jax._paths import user_path
from nosa_jax.hf import ByteTokenizer, FileTokenizer, stop_tokens
from nosa_jax.train.data.documents import Collector, Tokens
from pallas_kernels.checks import bad_type, bad_value, require_size

TokenizerLike = str | os.PathLike[str] | ByteTokenizer | FileTokenizer | None

_BATCH = 2**20  # bytes that are encoded together, by all cores
_PATIENCE = 3.0  # seconds without a bar


class Document(NamedTuple):
    """text: in UTF-8, or whatever the file held. where: its file and line, for messages."""

    text: bytes
    where: str


class Vocabulary(NamedTuple):
    """tokenizer: as given or read. folder: where it lies, None for an object. end_of_text: the id that ends documents,
    None without one."""

    tokenizer: ByteTokenizer | FileTokenizer
    folder: Path | None
    end_of_text: int | None

    @property
    def is_bytes(self) -> bool:
        return isinstance(self.tokenizer, ByteTokenizer)

    @property
    def dtype(self) -> np.dtype:
        """The smallest one that holds all ids."""
        return np.min_scalar_type(max(self.tokenizer.vocab_size - 1, self.end_of_text or 0))

    def size(self, tokens: Tokens) -> int:
        """The `vocab_size` of a source of these tokens. (Text in bytes may need fewer than 256.)"""
        return tokens.vocab_size if self.is_bytes else max(self.tokenizer.vocab_size, tokens.vocab_size)


def read_vocabulary(tokenizer: TokenizerLike, end_of_text: Any = None) -> Vocabulary:
    """The tokenizer that an argument `tokenizer` names, and the id that ends documents."""
    if end_of_text is not None:
        end_of_text = require_size("end_of_text", end_of_text, 0)
    if tokenizer is None:
        return Vocabulary(ByteTokenizer(), None, end_of_text)
    if isinstance(tokenizer, ByteTokenizer | FileTokenizer):
        return Vocabulary(tokenizer, None, end_of_text)
    if not isinstance(tokenizer, str | os.PathLike):
        remedy = "Pass a folder with a tokenizer.json, or None for bytes."
        raise bad_type("tokenizer", "must be a path or a tokenizer of nosa_jax.hf", type(tokenizer).__name__, remedy)
    path = user_path("tokenizer", tokenizer)
    found = FileTokenizer(path)
    folder = path if path.is_dir() else path.parent
    return Vocabulary(found, folder, _end_of_text(folder, found) if end_of_text is None else end_of_text)


def _end_of_text(folder: Path, tokenizer: FileTokenizer) -> int | None:
    """The first stop token of a folder's configuration, else the one whose text tokenizer_config.json names."""
    named = stop_tokens(folder)
    if named:
        return named[0]
    text = special_tokens(folder).get("eos_token")
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    return ids[0] if len(ids) == 1 else None


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder, empty without one."""
    file = folder / "tokenizer_config.json"
    return parse_object(str(file), file.read_bytes()) if file.is_file() else {}


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts that tokenizer_config.json has under names such as `bos_token`."""
    entries = {name: value for name, value in read_tokenizer_config(folder).items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def encode_documents(
    documents: Iterable[Document], vocabulary: Vocabulary, bar: Any
) -> tuple[Tokens, Int64[np.ndarray, "N 2"], float]:
    """The tokens of all documents, start and stop of each, and the mean number of bytes of text behind a token.

    Raises ValueError for text that is not UTF-8 where the tokenizer needs it.
    """
    collector, size = Collector(vocabulary.dtype), 0
    ending = [] if vocabulary.end_of_text is None else [vocabulary.end_of_text]
    for group in grouped(documents, lambda document: len(document.text)):
        if vocabulary.is_bytes:
            encoded: list[Any] = [np.frombuffer(text, np.uint8) for text, _ in group]
        else:
            encoded = vocabulary.tokenizer.encode_batch([_decode(document) for document in group])
        for ids in encoded:
            ended = not ending or (len(ids) and ids[-1] == ending[0])
            collector.add(ids if ended else np.append(ids, ending))
        size += sum(len(document.text) for document in group)
        bar.update(sum(len(document.text) for document in group))
    tokens, spans = collector.finish()
    return tokens, spans, size / max(tokens.size, 1)


def grouped[T](texts: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """What is encoded together, as much as keeps all cores busy; texts of no size are left out.

    size_of: in bytes.
    """
    group: list[T] = []
    size = 0
    for text in texts:
        if not size_of(text):
            continue
        group.append(text)
        size += size_of(text)
        if size >= _BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group


def _decode(document: Document) -> str:
    try:
        return document.text.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{document.text[error.start]:02x} at byte {error.start}"
        remedy = "Convert the file, or use tokenizer=None, which takes bytes as they are."
        raise bad_value(document.where, "must be UTF-8 for a tokenizer", got, remedy) from error


def as_utf8(text: str, where: str) -> bytes:
    """UTF-8 of text from JSON. Raises ValueError for half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise bad_value(where, "must hold text without single surrogates", got, "Correct or drop the line.") from error


def progress_bar(label: str, *, total: int | None = None, unit: str = "B", shown: bool = True) -> Any:
    """A bar on a terminal for what takes longer than a few seconds."""
    tqdm = import_extra("tqdm").tqdm
    disable = None if shown else True  # None: only where there is no terminal
    return tqdm(desc=label, total=total, unit=unit, unit_scale=True, delay=_PATIENCE, disable=disable, leave=False)
