"""Local Hugging Face folders: checkpoints both ways, and tokenizers."""

from nosa_jax.hf.load import from_pretrained
from nosa_jax.hf.save import save_pretrained
from nosa_jax.hf.tokenizer import ByteTokenizer, FileTokenizer

__all__ = ["ByteTokenizer", "FileTokenizer", "from_pretrained", "save_pretrained"]
