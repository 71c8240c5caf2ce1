"""What a saved folder says beside the model: what still holds of all that the model and the old folder came with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from nosa_jax.hf.config_json import unused
from nosa_jax.hf.folder import TOKENIZER_FILES, read_texts
from nosa_jax.hf.text import Tokenizer
from nosa_jax.hf.tokenizer import FileTokenizer
from nosa_jax.model import NosaLM
from nosa_jax.origin import GENERATION_NAME, Origin

_IDS = ("_token_id", "_token_ids")  # how keys of config.json end that name tokens


def carried(
    model: NosaLM, folder: Path, replaced: dict[str, Any], tokenizer: Tokenizer | None
) -> tuple[Origin, set[str]]:
    """The keys of config.json and the text files to write, and the names of the files of `folder` that must go.

    replaced: the config.json that lies in `folder`, empty without one. tokenizer: that of the model, None for the one
    that is there.

    Warns where a file stays that differs from the one that the model came with.
    """
    there, came = Origin(unused(replaced), read_texts(folder)), model.origin
    old = set(there.files)
    if replaced.get("vocab_size") != model.config.vocab_size:
        # The same ids are other tokens. (A tokenizer stays: a vocabulary may have been padded.)
        there = Origin({}, {name: data for name, data in there.files.items() if name != GENERATION_NAME})
    if tokenizer is not None:
        there, came = (_under(tokenizer, origin) for origin in (there, came))
    kept = set(there.files)
    other = sorted(name for name in kept & came.files.keys() if there.files[name] != came.files[name])
    if other:
        warnings.warn(
            f"path: {folder} keeps its own {', '.join(other)}, which the model did not come with. "
            "Remove them before saving if the model's are meant.",
            stacklevel=3,
        )
    if kept & set(TOKENIZER_FILES):  # a tokenizer is kept or taken as a whole
        kept.update(TOKENIZER_FILES)
    files = {name: data for name, data in came.files.items() if name not in kept}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.to_json().encode()
    return Origin({**there.config, **came.config}, files), old - kept


def _under(tokenizer: Tokenizer, origin: Origin) -> Origin:
    """What `origin` says that holds with `tokenizer` too: no file of its own one, and ids only where it is the same."""
    same = _is_same(tokenizer, origin.files.get("tokenizer.json"))
    gone = TOKENIZER_FILES if same else (*TOKENIZER_FILES, GENERATION_NAME)
    config = {key: value for key, value in origin.config.items() if same or not key.endswith(_IDS)}
    return Origin(config, {name: data for name, data in origin.files.items() if name not in gone})


def _is_same(tokenizer: Tokenizer, stored: bytes | None) -> bool:
    """Whether a stored tokenizer.json is that of `tokenizer`; where there is none, nothing says otherwise."""
    if stored is None:
        return True
    try:
        return FileTokenizer.from_json(stored).to_json() == tokenizer.to_json()
    except ValueError:  # it is damaged
        return False
