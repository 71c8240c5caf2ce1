"""The model of a checkpoint folder and the tokens of a text, as the subcommands load them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nosa_jax import NosaLM, from_pretrained
from nosa_jax.cli.terminal import note, working
from nosa_jax.config import Variant
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from pallas_kernels.device import current_device

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load(path: Path, variant: Variant | None, dtype: Dtype) -> NosaLM:
    """The model of a folder; dtype "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if current_device().platform == "cpu" else "bfloat16"
    with working(f"loading {path}"):
        return from_pretrained(path, dtype=dtype, variant=variant)


def note_context(model: NosaLM, length: int) -> None:
    """Says so where texts of `length` tokens are longer than what the model was made for."""
    if length > model.config.max_context:
        most = f"the {model.config.max_context:,} that the model's configuration is for"
        note(f"texts of {length:,} tokens are longer than {most}; expect poor answers there")


def note_attended(name: str, most: int, length: int) -> None:
    """Says so where what `name` attends to, `most` tokens, is all there is of texts of `length` tokens."""
    if length <= most:
        note(f"{name} attends to {most:,} tokens as it is set, so to all of a text of {length:,}: nothing is left out")


def encode(tokenizer: ByteTokenizer | FileTokenizer, text: bytes, name: str) -> list[int]:
    """Token ids of a text as it lies in a file: where tokens are bytes its own, whatever its encoding.

    Other tokenizers read UTF-8; what is none becomes U+FFFD, and a note says so of the text called `name`.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return list(text)
    try:
        return tokenizer.encode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        note(f"{name} is not UTF-8 (byte {error.start}); what cannot be read is taken as U+FFFD")
        return tokenizer.encode(text.decode("utf-8", errors="replace"))
