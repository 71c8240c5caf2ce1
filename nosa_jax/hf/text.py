"""What a checkpoint folder says about text: its tokenizer, its stop tokens, and text that grows token by token."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from nosa_jax.hf.tokenizer import ByteTokenizer, FileTokenizer
from pallas_kernels.checks import bad_value

Tokenizer = ByteTokenizer | FileTokenizer


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer.json of the folder `path`, or bytes for a vocabulary of 256.

    Raises ValueError where neither fits.
    """
    if (Path(path) / "tokenizer.json").is_file():
        return FileTokenizer(path)
    if vocab_size != ByteTokenizer.vocab_size:
        raise bad_value(
            "path",
            f"must hold a tokenizer.json for a vocabulary of {vocab_size} (256 would be bytes)",
            path,
            "Copy it from the original checkpoint.",
        )
    return ByteTokenizer()


def stop_tokens(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The end-of-text ids that generation_config.json or config.json of the folder `path` name; empty for none."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        if file.is_file():
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


@dataclasses.dataclass
class GrowingText:
    """Turns tokens into text piece by piece: a character is held back until all of its tokens are there.

    tokens: what is on the screen already, the prompt say; it decides whether a word gets its leading space.
    """

    tokenizer: Tokenizer
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
