"""The training data that the flags of a command name."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nosa_jax import train
from nosa_jax._json import parse_object
from nosa_jax.cli.flags import called
from nosa_jax.cli.terminal import size, working
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from nosa_jax.hf.folder import read_texts
from nosa_jax.hf.text import load_tokenizer
from nosa_jax.origin import GENERATION_NAME, Origin
from nosa_jax.train import Corpus, Source
from nosa_jax.train.data.tokenize import read_vocabulary
from pallas_kernels.checks import bad_value, require_number

Format = Literal["auto", "text", "jsonl", "tokens", "chat"]
ShardDtype = Literal["uint16", "uint32", "int32"]
Found = list[tuple[Format, list[Path]]]
_ENDINGS = {".jsonl": "jsonl", ".npy": "tokens", ".bin": "tokens"}


def read_corpus(files: tuple[str, ...] = (), heldout_fraction: float = 0.05) -> Corpus:
    """The corpus of `files` (folders, globs), or of Python's standard library where there are none."""
    with working("reading the text"):
        found = train.find_files(*files) if files else train.stdlib_files()
        return train.load_corpus(found, heldout_fraction=heldout_fraction)


def find_data(data: Sequence[Sequence[str]], weights: Sequence[float], forms: Sequence[Format]) -> Found:
    """The kind and the files of each source that `data` names (paths, folders, globs, as often as --data was given).

    weights: of a mixture, one for each of `data`; none for one text of all files.
    forms: one for all, or one for each of `data` in a mixture; "auto" goes by how the files' names end, which must be
        one kind.
    """
    if weights and len(weights) != len(data):
        remedy = "Write --data once for each source, for example --data a.jsonl --data b c --weights 0.7 0.3."
        raise bad_value("--weights", f"must be one for each --data, {len(data)} in all", len(weights), remedy)
    for weight in weights:
        if require_number("--weights", weight, 0.0) == 0:
            raise bad_value("--weights", "must be positive", weight, "Raise it, or drop its --data.")
    groups = data if weights else [tuple(itertools.chain(*data))]
    if len(forms) not in (1, len(groups)):
        rule = (
            f"must be one, or one for each of the {len(weights)} weights"
            if weights
            else "must be one without --weights"
        )
        raise bad_value("--format", rule, " ".join(forms) or "none", "Drop or add some.")
    with called("--data", "patterns"):
        found = [train.find_files(*group) for group in groups]
    pairs = zip(itertools.cycle(forms), found, strict=False)
    return [(_form(files) if form == "auto" else form, files) for form, files in pairs]


def read_source(
    found: Found,
    tokenizer: ByteTokenizer | FileTokenizer | Path | None,
    *,
    weights: Sequence[float] = (),
    end_of_text: int | None = None,
    field: str | None = None,
    template: Path | None = None,
    token_dtype: ShardDtype | None = None,
    **cut: Any,
) -> Source:
    """The source of what `find_data` found, a mixture where there are weights.

    field, template, token_dtype: None for the defaults. cut: length, block_size, pack and heldout_fraction.
    """
    kinds = [kind for kind, _ in found]
    _check_used(kinds, chat=("--template", template), jsonl=("--field", field), tokens=("--token-dtype", token_dtype))
    with called("--data", "files"):
        options: dict[str, dict[str, Any]] = {
            "text": {"tokenizer": tokenizer, "end_of_text": end_of_text},
            "jsonl": {"tokenizer": tokenizer, "end_of_text": end_of_text, "field": field or "text"},
            "tokens": {"end_of_document": end_of_text, "dtype": token_dtype or "uint16"},
            "chat": {"tokenizer": tokenizer},
        }
        if "chat" in kinds:
            options["chat"]["template"] = _read_template(template, tokenizer)
        sources: Any = [getattr(train, kind)(files, **options[kind], **cut) for kind, files in found]
    return sources[0] if len(sources) == 1 else train.mixture(list(zip(sources, weights, strict=True)))


def _check_used(kinds: Sequence[str], **flags: tuple[str, Any]) -> None:
    """Raises ValueError for a flag of a kind of data that there is none of."""
    for kind, (flag, value) in flags.items():
        if value is not None and kind not in kinds:
            remedy = f"Pass --format {kind}, or leave it out."
            raise bad_value(flag, f"must be given for --data of the format {kind}", f"{value} for {kinds}", remedy)


def _read_template(path: Path | None, tokenizer: Any) -> str | None:
    """The source of a chat template, None for that of the tokenizer's folder."""
    if path is None:
        if not isinstance(tokenizer, Path):
            remedy = "Name a file with a Jinja template, or give --init or --tokenizer a folder that brings one."
            raise bad_value("--template", "must be given for chats whose tokenizer is bytes", None, remedy)
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise bad_value("--template", "must be a file in UTF-8", path, "Convert it.") from error


def read_tokenizer(path: Path, vocab_size: int) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of --tokenizer, a folder or its tokenizer.json."""
    with called("--tokenizer", "path"):
        return FileTokenizer(path) if path.is_file() else load_tokenizer(path, vocab_size)


def origin_with(
    origin: Origin,
    tokenizer: ByteTokenizer | FileTokenizer | None,
    path: Path | None,
    template: Path | None,
    end_of_text: int | None,
) -> Origin:
    """What the folder of a model says that was trained with these flags: tokenizer, chat template and stop token.

    origin: what it says of itself. tokenizer: another than that, from `path` (None: bytes); None for its own.
    template, end_of_text: None for what the tokenizer's folder says.
    """
    if tokenizer is not None:  # of the files and ids of another one nothing holds
        files = {} if path is None else read_texts(path if path.is_dir() else path.parent)
        files["tokenizer.json"] = tokenizer.to_json().encode()
        stop = read_vocabulary(path, end_of_text).end_of_text
        config = {key: value for key, value in origin.config.items() if not key.endswith(("_token_id", "_token_ids"))}
        origin = Origin(config if stop is None else {**config, "eos_token_id": stop}, files, origin.model_type)
    if end_of_text is not None:
        origin = _ended_by(end_of_text, origin)
    if template is not None:
        files = {**origin.files, "chat_template.jinja": template.read_bytes()}
        origin = dataclasses.replace(origin, files=files)
    return origin


def _ended_by(token: int, origin: Origin) -> Origin:
    """`origin` with another stop token. It becomes the first of several where it is one of them."""
    ids = [token, *(other for other in origin.stop_tokens if other != token)]
    stop = ids if token in origin.stop_tokens and len(ids) > 1 else token
    files = dict(origin.files)
    if GENERATION_NAME in files:  # it has the last word, on how to sample too
        generation = parse_object(GENERATION_NAME, files[GENERATION_NAME])
        files[GENERATION_NAME] = (json.dumps({**generation, "eos_token_id": stop}, indent=2) + "\n").encode()
    return dataclasses.replace(origin, config={**origin.config, "eos_token_id": stop}, files=files)


def _form(files: list[Path]) -> Any:
    forms = sorted({_ENDINGS.get(Path(file.name.removesuffix(".gz")).suffix, "text") for file in files})
    if len(forms) > 1:
        remedy = "Pass --format for all of them, or mix them: one --data for each kind, with --weights."
        raise bad_value("--data", "must be files of one kind", f"files of {' and '.join(forms)}", remedy)
    return forms[0]


def describe(source: Corpus | Source) -> str:
    """The size of what is trained on, in words."""
    if isinstance(source, Corpus):
        return f"{size(len(source.train))} to train on, {size(len(source.heldout))} held out"
    counts = (getattr(source, name, None) for name in ("train_tokens", "heldout_tokens"))
    known = [_tokens(count) for count in counts if count is not None]
    return " to train on, ".join(known) + " held out" if len(known) == 2 else "a source of unknown size"


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count < 1e6 else f"{count / 1e6:.2f} M tokens"
