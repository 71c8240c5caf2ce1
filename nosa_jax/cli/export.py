"""`nosa export`: a checkpoint of a training run becomes a Hugging Face folder, or a file of its importance."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import nosa_jax
from nosa_jax import train
from nosa_jax._extras import require_extras
from nosa_jax.cli.data import read_tokenizer
from nosa_jax.cli.terminal import facts, heading, working
from nosa_jax.hf import ByteTokenizer
from nosa_jax.hf.load import origin_of
from nosa_jax.hf.save import check_folder
from nosa_jax.train.folder import CHECKPOINTS_NAME


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of any checkpoint of a training run as a Hugging Face folder."""

    run_folder: Path
    """Folder of the run, the --out of nosa train."""
    out: Path
    """Folder to write; with --importance-only, file."""
    step: int | None = None
    """Step of the checkpoint; default: the newest."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in the files."""
    tokenizer: Path | None = None
    """Folder with the tokenizer to write, or its file; default: that of the run's model, else bytes for 256 tokens."""
    importance_only: bool = False
    """Write A and delta alone, as one small safetensors file."""

    def run(self) -> int:
        require_extras("train", "hf")
        if not self.importance_only:
            check_folder(self.out)
        with working("reading the checkpoint"):
            model = train.load_model(self.run_folder / CHECKPOINTS_NAME, self.step)
        with working(f"writing {self.out}"):
            if self.importance_only:
                nosa_jax.save_importance(model, self.out)
            else:
                nosa_jax.save_pretrained(model, self.out, self.dtype, tokenizer=self._tokenizer(model))
        heading("Written")
        facts([("from", self.run_folder), ("to", self.out)])
        return 0

    def _tokenizer(self, model: nosa_jax.NosaLM) -> ByteTokenizer | nosa_jax.hf.FileTokenizer | None:
        """What to write; None for what the folder of the run's model brings along."""
        if self.tokenizer is not None:
            return read_tokenizer(self.tokenizer, model.config.vocab_size)
        if (self.run_folder / "model" / "config.json").is_file():
            model.origin = origin_of(self.run_folder / "model")
            return None
        return ByteTokenizer() if model.config.vocab_size == ByteTokenizer.vocab_size else None
