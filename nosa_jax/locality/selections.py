"""Records the block selections of a run, and keeps them with what is needed to measure them."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int32

from nosa_jax.config import AttentionConfig, CacheConfig, ModelConfig
from nosa_jax.decode import generate
from nosa_jax.locality.measures import block_bytes
from nosa_jax.locality.report import LocalityReport, locality_report
from nosa_jax.model import NosaLM
from pallas_kernels.checks import bad_type, bad_value, require_integers, require_shape

_FORMAT = "nosa-jax selections 1"


def record(
    model: NosaLM,
    prompt: Int[np.ndarray, " T"],
    new_tokens: int,
    forced: Int[np.ndarray, " new"] | None = None,
    *,
    chunk: int | None = None,
) -> Selections:
    """Decodes one row and records what every step selects, the cache in host memory.

    prompt: token ids of the row, read before the recording starts; its last token's selection is the first recorded.
    new_tokens: how many tokens are decoded, which is how many selections are recorded.
    forced: the tokens to feed after the prompt, so that several methods read the same text; None feeds each step the
        token that the model finds likeliest.
    chunk: tokens of the prompt read at once; None reads all of them. Less needs less memory.
    Raises ValueError or TypeError for what `nosa_jax.generate` refuses, and for a `full` model, which selects nothing.
    """
    generation = generate(
        model,
        prompt[None],
        max_new_tokens=new_tokens,
        cache=CacheConfig(),
        forced_tokens=None if forced is None else forced[None],
        record=("block_ids",),
        chunk=chunk,
    )
    jax.block_until_ready(generation)
    return Selections.from_generation(
        generation, np.asarray([len(prompt)]), config=model.config, itemsize=model.embed.dtype.itemsize
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Selections:
    """Which blocks every step selected, in host memory.

    block_ids: int32 [L, B, K, T, J], ascending, -1 padding at the end.
    positions: int32 [B, T], the query's position at every step: one by one upward in each row, then -1 for padding.
    head_dim, itemsize: of the KV cache, for bytes; itemsize 2 is bfloat16.
    label: the method's name in tables and figures.

    Raises ValueError or TypeError when shapes, dtypes or positions do not fit together.
    """

    block_ids: Int32[np.ndarray, "L B K T J"]
    positions: Int32[np.ndarray, "B T"]
    attention: AttentionConfig
    head_dim: int
    itemsize: int = 2
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("block_ids", "positions"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int32:
                got = getattr(array, "dtype", type(array).__name__)
                raise bad_type(f"Selections.{name}", "must be an int32 NumPy array", got, "Convert it.")
        require_shape("Selections.block_ids", self.block_ids, (None,) * 5, "[L, B, K, T, J]")
        batch, steps = self.block_ids.shape[1], self.block_ids.shape[3]
        require_shape("Selections.positions", self.positions, (batch, steps), "[B, T]")
        used = (self.positions >= 0).sum(1, keepdims=True)
        wanted = np.where(np.arange(steps) < used, self.positions[:, :1] + np.arange(steps), -1)
        if (self.positions != wanted).any():
            row = int((self.positions != wanted).any(-1).argmax())
            rule = "must count up one by one in each row, then be -1"
            raise bad_value("Selections.positions", rule, f"{self.positions[row]} in row {row}", "Record a whole run.")
        if not self.label:
            object.__setattr__(self, "label", self.attention.variant)

    @classmethod
    def from_forward(
        cls, out: Any, lengths: Any = None, *, config: ModelConfig, itemsize: int = 2, label: str = ""
    ) -> Selections:
        """From `nosa_jax.forward(..., record=True)`, whose `block_ids` is [L, B, K, T, J] for positions 0 .. T-1.

        lengths: int [B], tokens of each row; None means all T.   label: empty means the variant's name.
        """
        block_ids = _recorded(out)
        batch, steps = block_ids.shape[1], block_ids.shape[3]
        return cls._masked(
            block_ids, [0] * batch, [steps] * batch if lengths is None else lengths, config, itemsize, label
        )

    @classmethod
    def from_generation(
        cls, generation: Any, prompt_lengths: Any, *, config: ModelConfig, itemsize: int = 2, label: str = ""
    ) -> Selections:
        """From `nosa_jax.generate(..., record=True)`: `block_ids` [L, B, K, new, J] and `lengths` [B].

        Entry s belongs to position prompt_length - 1 + s: entry 0 is the selection of the last prompt token.
        prompt_lengths: int [B], tokens of each prompt.
        """
        prompt_lengths = _lengths("prompt_lengths", prompt_lengths)
        if (prompt_lengths < 1).any():
            raise bad_value("prompt_lengths", "must be >= 1", prompt_lengths, "Give every row a prompt.")
        return cls._masked(_recorded(generation), prompt_lengths - 1, generation.lengths, config, itemsize, label)

    @classmethod
    def _masked(
        cls, block_ids: np.ndarray, first: Any, lengths: Any, config: ModelConfig, itemsize: int, label: str
    ) -> Selections:
        """Row b holds `lengths[b]` steps from position `first[b]` on; whatever lies behind them becomes padding."""
        batch, steps = block_ids.shape[1], block_ids.shape[3]
        first, lengths = _lengths("prompt_lengths", first), _lengths("lengths", lengths)
        require_shape("prompt_lengths", first, (batch,), "[B]")
        require_shape("lengths", lengths, (batch,), "[B]")
        if (lengths < 0).any() or (lengths > steps).any():
            raise bad_value(
                "lengths", f"must be between 0 and T = {steps}", lengths, "Pass the recorded run's own lengths."
            )
        step = np.arange(steps)
        valid = step < lengths[:, None]
        positions = np.where(valid, first[:, None] + step, -1).astype(np.int32)
        block_ids = np.where(valid[:, None, :, None], block_ids, np.int32(-1))
        return cls(block_ids, positions, config.attention, config.head_dim, itemsize, label)

    def concatenate(self, later: Selections) -> Selections:
        """Both runs one after the other, row by row, e.g. a prefill and the generation that continues it.

        A position that both hold, as the last one of the prompt, is taken from `self`. Raises ValueError when the two
        are not of one model and batch, or a row of `later` leaves a gap.
        """
        for name in ("attention", "head_dim", "itemsize"):
            if getattr(self, name) != getattr(later, name):
                got = f"{getattr(self, name)} and {getattr(later, name)}"
                raise bad_value("later", f"must have the same {name}", got, "Join runs of one model only.")
        layers, batch, heads, _, width = self.block_ids.shape
        require_shape("later.block_ids", later.block_ids, (layers, batch, heads, None, width), "[L, B, K, T, J]")
        last = self.positions.max(axis=1, initial=-1)[:, None]
        fresh = later.positions > last
        positions = np.concatenate([self.positions, np.where(fresh, later.positions, -1)], axis=1)
        block_ids = np.concatenate([self.block_ids, np.where(fresh[:, None, :, None], later.block_ids, -1)], axis=3)
        order = np.argsort(positions < 0, axis=1, kind="stable")  # padding to the end of each row
        positions = np.take_along_axis(positions, order, axis=1)
        block_ids = np.take_along_axis(block_ids, order[None, :, None, :, None], axis=3)
        used = int((positions >= 0).sum(1).max(initial=0))
        return dataclasses.replace(
            self, positions=positions[:, :used].astype(np.int32), block_ids=block_ids[:, :, :, :used].astype(np.int32)
        )

    def report(self, slots: Sequence[int] | None = None) -> LocalityReport:
        """Measures these selections; see `nosa_jax.locality.locality_report`."""
        return locality_report(
            self.block_ids,
            self.positions,
            self.attention,
            bytes_per_block=block_bytes(self.attention, self.head_dim, self.itemsize),
            slots=slots,
            label=self.label,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a compressed .npz at exactly `path`."""
        header = {
            "format": _FORMAT,
            "attention": dataclasses.asdict(self.attention),
            "head_dim": self.head_dim,
            "itemsize": self.itemsize,
            "label": self.label,
        }
        with open(path, "wb") as file:  # an open file, because NumPy would append .npz to other names
            np.savez_compressed(file, block_ids=self.block_ids, positions=self.positions, header=json.dumps(header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selections:
        """Reads what `save` wrote. Raises ValueError for other files."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(str(arrays["header"]))
                block_ids, positions = arrays["block_ids"], arrays["positions"]
        except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise bad_value("path", "must be a file written by Selections.save", path, "Record it again.") from error
        if header.get("format") != _FORMAT:
            raise bad_value("path", f"must hold {_FORMAT!r}", repr(header.get("format")), "Record it again.")
        attention = AttentionConfig(**header["attention"])
        return cls(block_ids, positions, attention, header["head_dim"], header["itemsize"], header["label"])


def _recorded(out: Any) -> np.ndarray:
    block_ids = getattr(out, "block_ids", None)
    if block_ids is None:
        raise bad_value(
            "out",
            "must hold recorded selections",
            "block_ids=None",
            "Call with record=True (`full` selects no blocks).",
        )
    require_integers("block_ids", block_ids)
    require_shape("block_ids", block_ids, (None,) * 5, "[L, B, K, T, J]")
    return np.asarray(jax.device_get(block_ids), np.int32)  # explicit, so that a transfer guard lets it pass


def _lengths(name: str, lengths: Any) -> np.ndarray:
    lengths = np.asarray(jax.device_get(lengths))
    require_integers(name, lengths)
    require_shape(name, lengths, (None,), "[B]")
    return lengths
