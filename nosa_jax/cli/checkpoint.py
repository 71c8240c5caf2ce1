"""A checkpoint folder as the subcommands use it: model, tokenizer, stop tokens, and text that grows token by token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax

import nosa_jax
from nosa_jax import NosaLM
from nosa_jax.cli.terminal import working
from nosa_jax.config import Variant
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from pallas_kernels.checks import bad_value

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tokenizer = ByteTokenizer | FileTokenizer


def load(path: Path, variant: Variant | None, dtype: Dtype) -> NosaLM:
    """The model of a folder; dtype "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with working(f"loading {path}"):
        return nosa_jax.from_pretrained(path, dtype=dtype, variant=variant)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer.json, or bytes for a vocabulary of 256. Raises ValueError where neither fits."""
    if (path / "tokenizer.json").is_file():
        return FileTokenizer(path)
    if vocab_size != ByteTokenizer.vocab_size:
        raise bad_value(
            "path",
            f"must hold a tokenizer.json for a vocabulary of {vocab_size} (256 would be bytes)",
            path,
            "Copy it from the original checkpoint.",
        )
    return ByteTokenizer()


def stop_tokens(path: Path) -> tuple[int, ...]:
    """End-of-text ids that generation_config.json or config.json name."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            ids = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


@dataclasses.dataclass
class GrowingText:
    """Turns tokens into text piece by piece: a character is held back until all of its tokens are there.

    tokens: what is on the screen already, the prompt say; it decides whether a word gets its leading space.
    """

    tokenizer: Any
    tokens: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self._shown = len(self.tokens)
        self._context = max(self._shown - 1, 0)  # decoding starts here: one piece back is enough

    def add(self, token: int) -> str:
        """The text that is complete now and was not before."""
        self.tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is still held back, incomplete characters as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self.tokenizer.decode(self.tokens[self._context : self._shown])
        after = self.tokenizer.decode(self.tokens[self._context :])
        if after.endswith("\ufffd") and not final:
            return ""
        self._context, self._shown = self._shown, len(self.tokens)
        return after[len(before) :]
