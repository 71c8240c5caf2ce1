"""The training data that the flags of a command name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from nosa_jax import train
from nosa_jax.cli.flags import called
from nosa_jax.cli.terminal import working
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from nosa_jax.hf.text import load_tokenizer
from nosa_jax.train import Corpus, Source
from pallas_kernels.checks import bad_value

Format = Literal["auto", "text", "jsonl", "tokens", "chat"]
_ENDINGS = {".jsonl": "jsonl", ".npy": "tokens", ".bin": "tokens"}


def read_corpus(files: tuple[str, ...] = (), heldout_fraction: float = 0.05) -> Corpus:
    """The corpus of `files` (folders, globs), or of Python's standard library where there are none."""
    with working("reading the text"):
        found = train.find_files(*files) if files else train.stdlib_files()
        return train.load_corpus(found, heldout_fraction=heldout_fraction)


def read_source(
    data: tuple[str, ...],
    form: Format,
    tokenizer: ByteTokenizer | FileTokenizer | Path | None,
    end_of_text: int | None,
    **cut: Any,
) -> Source:
    """The source of the files that `data` names (paths, folders, globs).

    form: "auto" goes by how the files' names end, which must be one kind. cut: length, block_size, pack and
        heldout_fraction.
    """
    with called("--data", "patterns", "files"):
        files = train.find_files(*data)
        if form == "auto":
            form = _form(files)
        if form == "tokens":
            return train.tokens(files, end_of_document=end_of_text, **cut)
        if form == "chat":
            return train.chat(files, tokenizer, **cut)
        make = train.jsonl if form == "jsonl" else train.text
        return make(files, tokenizer, end_of_text=end_of_text, **cut)


def read_tokenizer(path: Path, vocab_size: int) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of --tokenizer, a folder or its tokenizer.json."""
    with called("--tokenizer", "path"):
        return FileTokenizer(path) if path.is_file() else load_tokenizer(path, vocab_size)


def _form(files: list[Path]) -> Any:
    forms = sorted({_ENDINGS.get(Path(file.name.removesuffix(".gz")).suffix, "text") for file in files})
    if len(forms) > 1:
        remedy = "Pass --format for all of them, or train on one kind."
        raise bad_value("--data", "must be files of one kind", f"files of {' and '.join(forms)}", remedy)
    return forms[0]


def describe(source: Corpus | Source) -> str:
    """The size of what is trained on, in words."""
    if isinstance(source, Corpus):
        return f"{len(source.train) / 1e6:.2f} MB to train on, {len(source.heldout) / 1e6:.2f} MB held out"
    counts = (getattr(source, name, None) for name in ("train_tokens", "heldout_tokens"))
    known = [f"{count / 1e6:.2f} M tokens" for count in counts if count is not None]
    return " to train on, ".join(known) + " held out" if len(known) == 2 else "a source of unknown size"
