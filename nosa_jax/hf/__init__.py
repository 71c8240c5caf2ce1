"""Local Hugging Face folders: checkpoints both ways, tokenizers, and text that grows token by token."""

from nosa_jax.hf.importance_file import load_importance, save_importance
from nosa_jax.hf.load import from_pretrained
from nosa_jax.hf.save import save_pretrained
from nosa_jax.hf.text import GrowingText, load_tokenizer, stop_tokens
from nosa_jax.hf.tokenizer import ByteTokenizer, FileTokenizer

__all__ = [
    "ByteTokenizer",
    "FileTokenizer",
    "GrowingText",
    "from_pretrained",
    "load_importance",
    "load_tokenizer",
    "save_importance",
    "save_pretrained",
    "stop_tokens",
]
