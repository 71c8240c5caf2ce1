"""Records the block selections of a run, and keeps them with what is needed to measure them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int, Int32

from nosa_jax._paths import user_path
from nosa_jax.config import AttentionConfig, CacheConfig, ModelConfig
from nosa_jax.decode import generate
from nosa_jax.locality import stored
from nosa_jax.locality.importance import require_importance, token_importance
from nosa_jax.locality.replay import block_bytes
from nosa_jax.locality.report import LocalityReport, locality_report
from nosa_jax.locality.rules import require_counting, require_selections
from nosa_jax.model import NosaLM
from pallas_kernels.checks import (
    bad_type,
    bad_value,
    require_bool,
    require_int,
    require_integers,
    require_shape,
    require_type,
)


def record(
    model: NosaLM,
    prompt: Int[np.ndarray, " T"],
    new_tokens: int,
    forced: Int[np.ndarray, " new"] | None = None,
    *,
    chunk: int | None = None,
    importance: bool = False,
    label: str = "",
) -> Selections:
    """Decodes one row and records what every step selects, the cache in host memory.

    prompt: token ids of the row, read before the recording starts; its last token's selection is the first recorded.
    new_tokens: how many tokens are decoded, which is how many selections are recorded.
    forced: the tokens to feed after the prompt, so that several methods read the same text; None feeds each step the
        token that the model finds likeliest.
    chunk: tokens of the prompt read at once; None reads all of them. Less needs less memory.
    importance: keep the importance of each token that was read, too (`Selections.importance`). They are read once more.
    label: the method's name in tables and figures; empty means the variant's name.
    Raises ValueError or TypeError for what `nosa_jax.generate` refuses, for a `full` model, which selects nothing, and
    for the importance of a variant that has none.
    """
    require_type("label", label, str, "Name the method.")
    if require_bool("importance", importance):
        require_importance(model)  # before the row is decoded
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
    recorded = Selections.from_generation(
        generation, np.asarray([len(prompt)]), config=model.config, itemsize=model.embed.dtype.itemsize, label=label
    )
    if not importance:
        return recorded
    fed = jax.device_get(generation.tokens)[0, : new_tokens - 1]  # the last one is drawn and not read
    tokens = np.concatenate([np.asarray(prompt), fed]).astype(np.int32)
    return dataclasses.replace(recorded, importance=token_importance(model, tokens[None], chunk=chunk))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selections:
    """Which blocks every step selected, in host memory.

    block_ids: int32 [L, B, K, T, J], ascending, -1 padding at the end.
    positions: int32 [B, T], the query's position at every step: one by one upward in each row, then -1 for padding.
    head_dim, itemsize: of the KV cache, for bytes; itemsize 2 is bfloat16.
    label: the method's name in tables and figures.
    importance: float32 [L, B, K, N], of the first N tokens of each row, NaN behind its end; None where it was not
        recorded.

    Raises ValueError or TypeError when shapes, dtypes or positions do not fit together, and for ids that are not in
    order, come twice, or name a block behind the query.
    """

    block_ids: Int32[np.ndarray, "L B K T J"]
    positions: Int32[np.ndarray, "B T"]
    attention: AttentionConfig
    head_dim: int
    itemsize: int = 2
    label: str = ""
    importance: Float32[np.ndarray, "L B K N"] | None = None

    def __post_init__(self) -> None:
        for name in ("block_ids", "positions"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int32:
                got = getattr(array, "dtype", type(array).__name__)
                raise bad_type(f"Selections.{name}", "must be an int32 NumPy array", got, "Convert it.")
        require_type("Selections.attention", self.attention, AttentionConfig, "Pass ModelConfig.attention.")
        require_type("Selections.label", self.label, str, "Name the method.")
        for name in ("head_dim", "itemsize"):
            object.__setattr__(self, name, require_int(f"Selections.{name}", getattr(self, name), 1))
        require_shape("Selections.block_ids", self.block_ids, (None,) * 5, "[L, B, K, T, J]")
        batch, steps = self.block_ids.shape[1], self.block_ids.shape[3]
        require_shape("Selections.positions", self.positions, (batch, steps), "[B, T]")
        require_counting(self.positions)
        width = (None, None, None, None, self.attention.num_selected_blocks)
        require_shape("Selections.block_ids", self.block_ids, width, "[L, B, K, T, J]")
        require_selections(self.block_ids, self.positions[:, None, :, None] // self.attention.block_size)
        if self.importance is not None:
            if not isinstance(self.importance, np.ndarray) or self.importance.dtype != np.float32:
                got = getattr(self.importance, "dtype", type(self.importance).__name__)
                raise bad_type("Selections.importance", "must be a float32 NumPy array", got, "Convert it.")
            require_shape("Selections.importance", self.importance, (*self.block_ids.shape[:3], None), "[L, B, K, N]")
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
        Raises ValueError for a model of variant `full`, whose recorded units, where there are any, are a policy's.
        """
        if not config.attention.is_sparse:
            rule = "must be of a model that selects blocks; what a policy records are units of its own"
            raise bad_value(
                "config", rule, "variant 'full'", "Use block_ids and fetched of the generation as they are."
            )
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

        A position that both hold, as the last one of the prompt, is taken from `self`; importance from the run that has
        more of it. Raises ValueError when the two
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
        known = [run.importance for run in (self, later) if run.importance is not None]
        return dataclasses.replace(
            self,
            positions=positions[:, :used].astype(np.int32),
            block_ids=block_ids[:, :, :, :used].astype(np.int32),
            importance=max(known, key=lambda importance: importance.shape[-1], default=None),
        )

    def report(self, slots: Sequence[int] | None = None, **options: Any) -> LocalityReport:
        """Measures these selections; options are `windows` and `belady` of `nosa_jax.locality.locality_report`."""
        return locality_report(
            self.block_ids,
            self.positions,
            self.attention,
            bytes_per_block=block_bytes(self.attention, self.head_dim, self.itemsize),
            slots=slots,
            label=self.label,
            **options,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a compressed .npz at exactly `path`, with all that measuring and replaying need; an id takes a byte or
        two before compression. A file that is there is replaced at the end, or not at all."""
        header = {name: getattr(self, name) for name in ("head_dim", "itemsize", "label")}
        header["attention"] = dataclasses.asdict(self.attention)
        arrays = {} if self.importance is None else {"importance": self.importance}
        stored.write(user_path("path", path), header, self.block_ids, positions=self.positions, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selections:
        """Reads what `save` wrote.

        Raises ValueError for other files, before memory is asked for what they claim to hold; OSError for a file that
        cannot be opened.
        """
        path = user_path("path", path)
        fields = stored.read(path)
        with stored.refusing(path):
            return cls(**fields)

    def __repr__(self) -> str:
        layers, batch, heads, steps, width = self.block_ids.shape
        return (
            f"Selections({self.label!r}: {steps} steps of {batch} rows, {layers} layers, {heads} KV heads, "
            f"{width} blocks of {self.attention.block_size} tokens each)"
        )


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
