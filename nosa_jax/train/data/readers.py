"""Sources of text: one document per file or per line, and shards of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from nosa_jax._json import refuse_pointer
from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.files import is_binary, read_bytes, unique_files, warn, warn_skipped
from nosa_jax.train.data.json_lines import read_objects
from nosa_jax.train.data.source import Cut, DocumentSource
from nosa_jax.train.data.tokenize import (
    Document,
    TokenizerLike,
    as_utf8,
    encode_documents,
    progress_bar,
    read_vocabulary,
)
from pallas_kernels.checks import bad_type, bad_value, require_number, require_one_of, require_size

Files = Iterable[str | os.PathLike[str]]
_SHARDS = (".npy", ".bin")


def text(
    files: Files,
    tokenizer: TokenizerLike = None,
    length: int = 8192,
    pack: bool = True,
    *,
    block_size: int = 64,
    heldout_fraction: float = 0.05,
    heldout_seed: int = 0,
    end_of_text: int | None = None,
    progress: bool = True,
) -> DocumentSource:
    """A source of local text, one document per file.

    files: paths, see `find_files`. Binary and empty ones are skipped with a warning.
    tokenizer: a folder with a tokenizer.json, or that file, or a tokenizer of `nosa_jax.hf`; None for bytes.
    length: T, target tokens of a row.
    pack: several documents to a row, see below; False for windows of all documents one after the other.
    block_size: packed documents start on its multiples; that of the model's attention.
    heldout_fraction: share of all tokens that is never trained on, in whole documents where that comes close.
    heldout_seed: draws these documents; another one than that of the order, which may change from run to run.
    end_of_text: the id that ends every document. None: the first stop token that the tokenizer's folder names, or none
        where it names none, or where there is no folder.
    progress: whether a bar is shown on a terminal where reading takes long.

    All text is encoded once, now, and stays in memory, in one byte per token for bytes and in two or four for a
    tokenizer. A tokenizer adds the tokens that its file asks for (a leading BOS, say) and takes a document whole: cut
    files of many gigabytes into parts.

    Packed rows hold every token once. A document longer than a row is cut into pieces; each piece starts on a multiple
    of `block_size`; no target lies in another document. Windows hold all targets but the rest that fills no window, and
    neighbours in the text share one token.

    Raises TypeError or ValueError for arguments out of range, for text that is not UTF-8 where a tokenizer needs it
    (with file and byte), and where there is not one row to train on.
    """
    cut = Cut(length, pack, block_size, heldout_fraction, heldout_seed)
    vocabulary = read_vocabulary(tokenizer, end_of_text)
    paths = unique_files(files)
    binary: list[Path] = []
    empty: list[Path] = []

    def documents() -> Iterator[Document]:
        for path in paths:
            content = read_bytes(path)
            if is_binary(content):
                binary.append(path)
            elif not len(content):
                empty.append(path)
            else:
                yield Document(content.tobytes(), str(path))

    with progress_bar("reading", total=total_bytes(paths), shown=progress) as bar:
        tokens, spans, bytes_per_token = encode_documents(documents(), vocabulary, bar)
    require_tokens(tokens, f"{len(binary)} that are not text and {len(empty)} that are empty")
    warn_skipped(binary, "not text")
    warn_skipped(empty, "empty")
    return cut.source(tokens, spans, bytes_per_token=bytes_per_token, vocab_size=vocabulary.size(tokens))


def jsonl(
    files: Files,
    tokenizer: TokenizerLike = None,
    length: int = 8192,
    pack: bool = True,
    *,
    field: str = "text",
    block_size: int = 64,
    heldout_fraction: float = 0.05,
    heldout_seed: int = 0,
    end_of_text: int | None = None,
    progress: bool = True,
) -> DocumentSource:
    """A source of files with a JSON object per line, each of which is a document; files that end in .gz are unpacked.

    field: of the object, where its text is. Documents without any text are passed over with a warning.
    All other arguments, rows and memory: as in `text`.

    Raises TypeError or ValueError as `text` does, and for a line that is no such object, with file and line.
    """
    cut = Cut(length, pack, block_size, heldout_fraction, heldout_seed)
    vocabulary = read_vocabulary(tokenizer, end_of_text)
    paths = unique_files(files)
    empty: list[str] = []

    def documents() -> Iterator[Document]:
        for found, where in read_objects(paths):
            content = found.get(field)
            if not isinstance(content, str):
                got = f"{type(content).__name__} {content!r:.60}" if field in found else f"fields {sorted(found)!r:.80}"
                is_chat = "messages" in found or "conversations" in found
                remedy = "Read chats with train.chat (--format chat)" if is_chat else "Correct the line"
                raise bad_value(where, f"must hold text under {field!r}", got, f"{remedy}, or pass field=.")
            if not content:
                empty.append(where)
            yield Document(as_utf8(content, where), where)

    with progress_bar("reading", total=total_bytes(paths), shown=progress) as bar:
        tokens, spans, bytes_per_token = encode_documents(documents(), vocabulary, bar)
    require_tokens(tokens, f"{len(empty)} lines without any")
    if empty:
        warn(f"skipped {len(empty)} lines without text, the first at {empty[0]}")
    return cut.source(tokens, spans, bytes_per_token=bytes_per_token, vocab_size=vocabulary.size(tokens))


def tokens(
    files: Files,
    length: int = 8192,
    pack: bool = True,
    *,
    dtype: str = "uint16",
    end_of_document: int | None = None,
    bytes_per_token: float = 1.0,
    block_size: int = 64,
    heldout_fraction: float = 0.05,
    heldout_seed: int = 0,
    progress: bool = True,
) -> DocumentSource:
    """A source of shards of token ids, which stay on disk: .npy files of one dimension, and raw .bin files.

    files: paths, read in sorted order. Empty ones are skipped with a warning.
    dtype: of .bin files: "uint16", "uint32" or "int32", little-endian.
    end_of_document: the id after which a document ends, its last token. None: every shard is one document.
    bytes_per_token: mean bytes of text behind a token, for bits per byte.
    All other arguments and rows: as in `text`.

    Every shard is read once, now, for the ends of documents, the largest id and the fingerprint. What stays in memory
    are a few numbers per document.

    Raises TypeError or ValueError for arguments out of range, for files of other kinds, and for negative ids.
    """
    cut = Cut(length, pack, block_size, heldout_fraction, heldout_seed)
    require_one_of("dtype", dtype, ("uint16", "uint32", "int32"))
    bytes_per_token = float(require_number("bytes_per_token", bytes_per_token, 1e-3))
    if end_of_document is not None:
        end_of_document = require_size("end_of_document", end_of_document, 0)
    opened = [(path, _open_shard(path, np.dtype(dtype).newbyteorder("<"))) for path in unique_files(files)]
    shards = [(path, shard) for path, shard in opened if len(shard)]
    empty = [path for path, shard in opened if not len(shard)]
    with progress_bar("reading", total=sum(len(shard) for _, shard in shards), unit="", shown=progress) as bar:
        found = Tokens(
            [shard for _, shard in shards],
            end_of_document=end_of_document,
            names=[str(path) for path, _ in shards],
            progress=bar.update,
        )
    require_tokens(found, f"{len(empty)} that are empty")
    warn_skipped(empty, "empty")
    return cut.source(found, _documents(found), bytes_per_token=bytes_per_token, vocab_size=found.vocab_size)


def _documents(tokens: Tokens) -> Int64[np.ndarray, "N 2"]:
    """Start and stop of the documents in shards: each ends at its last token or with its shard."""
    stops = np.union1d(tokens.ends, np.asarray(tokens.shard_ends, np.int64))
    return np.stack([np.append(0, stops[:-1]), stops], axis=1)


def _open_shard(path: Path, dtype: np.dtype) -> np.ndarray:
    """The ids in a file, mapped."""
    require_one_of("files", path.suffix, _SHARDS, f"{path} is neither; write it with numpy.save.")
    with path.open("rb") as file:
        refuse_pointer(str(path), file.read(64))
    size = path.stat().st_size
    if not size:
        return np.zeros(0, dtype)
    if path.suffix == ".bin":
        if size % dtype.itemsize:
            rule = f"must hold whole numbers of {dtype.itemsize} bytes each"
            raise bad_value(str(path), rule, f"{size} bytes", "Copy it again, or pass dtype=.")
        return np.memmap(path, dtype, "r")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise bad_value(str(path), "must be a whole .npy file", f"({error})", "Copy or write it again.") from error
    if not np.issubdtype(found.dtype, np.integer):
        raise bad_type(str(path), "must hold integers", found.dtype, "Save token ids.")
    if found.ndim != 1:
        raise bad_value(str(path), "must have one dimension", found.shape, "Flatten it.")
    return found


def total_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes of text in the files, None where that is not known before they are unpacked."""
    paths = list(paths)
    return None if any(path.suffix == ".gz" for path in paths) else sum(path.stat().st_size for path in paths)


def require_tokens(tokens: Tokens, skipped: str) -> None:
    """Raises ValueError where the files gave no token."""
    if not tokens.size:
        raise bad_value("files", "must hold text", skipped, "Point to other files.")
