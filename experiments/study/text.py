"""Long real text: the source code of installed packages, with whole packages held out.

Rows packed from short files teach no distance. The files of a package one after the other, each under a line with its
name, are a document as long as one likes, whose parts refer to each other.
"""

from __future__ import annotations

import dataclasses
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from nosa_jax import train
from nosa_jax.train.data.source import Cut, DocumentSource
from nosa_jax.train.data.tokenize import Document, encode_documents, progress_bar, read_vocabulary
from pallas_kernels.checks import bad_value, require_int, require_number

# Copies of other packages would be on both sides of the split; generated and test files say little.
SKIPPED = {"_vendor", "vendor", "_vendored", "vendored", "third_party", "externals", "tests", "test", "__pycache__"}
GRAM = 13  # tokens of a run that counts as copied, as studies of contamination have it


@dataclasses.dataclass(frozen=True)
class Text:
    """source: of training rows, and of the held-out documents, those that were left out for copying dropped.
    heldout: names of the packages of the held-out documents, in order. overlap: of each the share of its runs of 13
    tokens that the training text has, too. dropped: name and share of those that were left out."""

    source: DocumentSource
    heldout: list[str]
    overlap: list[float]
    dropped: list[tuple[str, float]]


def packages(root: Path | None = None) -> dict[str, list[Path]]:
    """The Python files of every package (a folder with an __init__.py) in the folder `root`, sorted; None: the
    packages installed beside this one."""
    root = Path(sysconfig.get_paths()["purelib"]) if root is None else root
    found = {}
    for folder in sorted(path.parent for path in root.glob("*/__init__.py")):
        if folder.name in SKIPPED:
            continue
        files = sorted(folder.rglob("*.py"))
        found[folder.name] = [file for file in files if not SKIPPED & set(file.relative_to(folder).parts)]
    return found


def is_held_out(name: str, fraction: float, seed: int = 0) -> bool:
    """Whether the package `name` is held out. It depends on the name alone: other packages change nothing."""
    return zlib.crc32(f"{seed}:{name}".encode()) < fraction * 2**32


def joined(files: Sequence[Path]) -> str:
    """The files of a package as one text. What is not UTF-8, or empty, is left out."""
    parts = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if content.strip():
            parts.append(f"# {'/'.join(file.parts[-2:])}\n{content}")
    return "\n\n".join(parts)


def packages_source(
    found: dict[str, list[Path]],
    tokenizer: Any = None,
    length: int = 8192,
    *,
    block_size: int = 64,
    heldout_fraction: float = 0.2,
    seed: int = 0,
    join: bool = True,
    documents_per_package: int = 2,
    most_characters: int | None = None,
    most_overlap: float = 0.5,
) -> Text:
    """Rows of the packages `found`, some of them held out whole.

    tokenizer, length, block_size: as `train.text` takes them; rows are packed.
    heldout_fraction, seed: the share of packages that is held out, and what draws them, see `is_held_out`.
    join: whether a package's files are one document for training; False makes each file one.
    documents_per_package: how many documents of exactly `length` tokens each held-out package gives at most, from its
        beginning on. They are of joined files in any case, and packages with less text than that give none.
    most_characters: of a package's text, from its beginning on, so that large packages do not outweigh the others (of a
        file's, where training text is not joined); None takes all.
    most_overlap: held-out documents of which more than this share is in the training text, too, are dropped.

    Raises ValueError where nothing is left on one of the two sides, and for arguments out of range.
    """
    cut = Cut(length, True, block_size)
    require_int("documents_per_package", documents_per_package, 1)
    if most_characters is not None:
        require_int("most_characters", most_characters, 1, "must be an int >= 1 or None")
    require_number("heldout_fraction", heldout_fraction, 0.0, 1.0)
    require_number("most_overlap", most_overlap, 0.0, 1.0)
    vocabulary = read_vocabulary(tokenizer)
    names: dict[bool, list[str]] = {True: [], False: []}
    for name in found:
        names[is_held_out(name, heldout_fraction, seed)].append(name)
    documents = []
    for name in names[False]:
        groups = [found[name]] if join else [[file] for file in found[name]]
        documents += [Document(text.encode(), name) for group in groups if (text := joined(group)[:most_characters])]
    training = len(documents)
    held = [Document(text.encode(), name) for name in names[True] if (text := joined(found[name])[:most_characters])]
    for side, count in (("to train on", training), ("held out", len(held))):
        if not count:
            raise bad_value("found", f"must have packages {side}", "none", "Change seed or heldout_fraction.")
    with progress_bar("reading") as bar:
        tokens, spans, bytes_per_token = encode_documents([*documents, *held], vocabulary, bar)
    pieces, owners = [], []
    for document, (start, stop) in zip(held, spans[training:].tolist(), strict=True):
        count = min((stop - start) // length, documents_per_package)
        pieces += [(start + n * length, start + (n + 1) * length) for n in range(count)]
        owners += [document.where] * count
    heldout = np.array(pieces, np.int64).reshape(-1, 2)
    shares = overlap(
        (tokens.read(*span) for span in spans[:training].tolist()), [tokens.read(*span) for span in heldout.tolist()]
    )
    kept = np.array([share <= most_overlap for share in shares], bool)
    if not kept.any():
        remedy = "Hold out more, or shorten the rows."
        raise bad_value("found", f"must hold out documents of {length} tokens of their own", "none", remedy)
    source = DocumentSource(
        tokens, spans[:training], heldout[kept], cut,
        bytes_per_token=bytes_per_token, vocab_size=vocabulary.size(tokens), argument="found",
    )  # fmt: skip
    return Text(
        source,
        [owner for owner, keep in zip(owners, kept, strict=True) if keep],
        [share for share, keep in zip(shares, kept, strict=True) if keep],
        [(owner, share) for owner, share, keep in zip(owners, shares, kept, strict=True) if not keep],
    )


def half_long(long: Text, short: Text) -> Any:
    """A source of which half of the rows are of joined files and half of single ones; what is held out is that of both.

    Make both of the same packages, with the same seed: the same packages are held out then.
    """
    return train.mixture([(long.source, 0.5), (short.source, 0.5)])


def overlap(training: Iterable[np.ndarray], heldout: Sequence[np.ndarray], size: int = GRAM) -> list[float]:
    """Of each held-out document the share of its runs of `size` tokens that a training document has, too.

    Memory is that of the held-out runs: training documents are looked at one by one. Runs are compared by hashes of
    64 bits. A document with no such run has 0.
    """
    grams = [_hashes(ids, size) for ids in heldout]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))
    seen: Bool[np.ndarray, " U"] = np.zeros(len(known), bool)
    for ids in training:
        found = _hashes(ids, size)
        if len(known) and len(found):
            place = np.minimum(np.searchsorted(known, found), len(known) - 1)
            seen[place[known[place] == found]] = True
    return [float(seen[np.searchsorted(known, each)].mean()) if len(each) else 0.0 for each in grams]


def _hashes(ids: Int64[np.ndarray, " T"], size: int) -> np.ndarray:
    """A hash of every run of `size` ids, uint64."""
    ids = np.asarray(ids).astype(np.uint64) + np.uint64(1)
    count = max(len(ids) - size + 1, 0)
    found = np.zeros(count, np.uint64)
    for n in range(size):
        found = found * np.uint64(0x9E3779B97F4A7C15) + ids[n : n + count]  # wraps, as it should
        found ^= found >> np.uint64(29)
    return found
