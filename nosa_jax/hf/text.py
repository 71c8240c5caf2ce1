"""What a checkpoint folder says about text: its tokenizer, its stop tokens, and text that grows token by token."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from nosa_jax._json import parse_object
from nosa_jax.hf.folder import TOKENIZER_FILES, existing_folder, read_texts
from nosa_jax.hf.tokenizer import ByteTokenizer, FileTokenizer
from nosa_jax.origin import CONFIG_NAME, GENERATION_NAME, end_of_text
from pallas_kernels.checks import bad_value

Tokenizer = ByteTokenizer | FileTokenizer
_CHARACTER = 4  # tokens that a character takes at most, as many as UTF-8 has bytes for it


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer.json of the folder `path`, or bytes for a vocabulary of 256 and for `ByteTokenizer().to_json()`.

    Raises ValueError where neither fits, FileNotFoundError where there is no such folder.
    """
    folder = existing_folder(path)
    return tokenizer_of(read_texts(folder), vocab_size, folder)


def tokenizer_of(files: Mapping[str, bytes], vocab_size: int, folder: Path) -> Tokenizer:
    """As `load_tokenizer`, of files that were read before, such as `model.origin.files`. folder: for messages."""
    if "tokenizer.json" in files:
        tokenizer = FileTokenizer.from_json(files["tokenizer.json"], str(folder / "tokenizer.json"))
        plain = ByteTokenizer()
        # Of the two it is the one that also takes bytes that are no UTF-8.
        is_plain = tokenizer.vocab_size == plain.vocab_size and tokenizer.to_json() == plain.to_json()
        return plain if is_plain else tokenizer
    if vocab_size != ByteTokenizer.vocab_size:
        others = [name for name in TOKENIZER_FILES if name in files]
        raise bad_value(
            "path",
            f"must hold a tokenizer.json for a vocabulary of {vocab_size} (256 would be bytes)",
            f"{folder}" + (f" with {', '.join(others)}" if others else ""),
            "Copy it from the original checkpoint; for a model of bytes write ByteTokenizer().to_json() there.",
        )
    return ByteTokenizer()


def stop_tokens(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The end-of-text ids that generation_config.json or config.json of the folder `path` name; empty for none.

    `model.stop_tokens` are those of the folder that a model was loaded from.

    Raises FileNotFoundError where there is no such folder, ValueError for a damaged file.
    """
    folder = existing_folder(path)
    files = [folder / name for name in (GENERATION_NAME, CONFIG_NAME)]
    generation, config = (parse_object(str(file), file.read_bytes()) if file.is_file() else {} for file in files)
    return end_of_text(generation, config, folder)


@dataclasses.dataclass
class GrowingText:
    """Turns tokens into text piece by piece; all pieces together are what the tokens decode to.

    A character is held back until all of its tokens are there, and byte-fallback tokens until their run is over: a
    byte that does not fit would change the text of all of them.

    tokens: what is on the screen already, the prompt say; it decides whether a word gets its leading space.
    """

    tokenizer: Tokenizer
    tokens: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self._restart()

    def add(self, token: int) -> str:
        """The text that is complete now and was not before."""
        self.tokens.append(token)
        return "" if self._is_open(token) else self._advance(final=False)

    def finish(self) -> str:
        """What is still held back, incomplete characters as U+FFFD."""
        return self._advance(final=True)

    def _restart(self) -> None:
        """All tokens are shown. Decoding starts again as late as the text does not depend on what was before."""
        self._shown = len(self.tokens)
        self._context = max(self._shown - 1, 0)
        while self._context > 0 and not self._may_start_at(self._context):
            self._context -= 1

    def _may_start_at(self, start: int) -> bool:
        if self.tokens[start] in self.tokenizer.fallback_ids:
            return False
        if not self.tokenizer.decode([self.tokens[start]]):
            return False  # a decoder may drop the space of what comes after nothing
        # U+FFFD would be the second half of a character. Only what one character takes is decoded: to decode all that
        # follows would, in a long prompt without a place to start at, take time by the square of its length.
        end = min(start + _CHARACTER, self._shown)
        return not self.tokenizer.decode(self.tokens[start:end]).startswith("\ufffd")

    def _is_open(self, token: int) -> bool:
        """Whether the text so far may yet change: after one byte of a run, or after a token that has no text."""
        return token in self.tokenizer.fallback_ids or not self.tokenizer.decode([token])

    def _advance(self, final: bool) -> str:
        before = self.tokenizer.decode(self.tokens[self._context : self._shown])
        after = self.tokenizer.decode(self.tokens[self._context :])
        if after.endswith("\ufffd") and not final:
            return ""
        if not after.startswith(before):
            before = before.rstrip("\ufffd")  # half a character then, a whole one now
        self._restart()
        return after[len(before) :]
