"""What a step of training reads, and what can be read from: batches, sources, and the position in a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nosa_jax._pytree import pytree_dataclass
from pallas_kernels.checks import bad_value


@pytree_dataclass
class Batch:
    """Rows of tokens with what is to be predicted from them, a pytree. Each array is [B, T], on the host or a device.

    tokens: int32.
    targets: int32; `targets[b, t]` is the token after `tokens[b, t]`.
    mask: bool, which targets count; None where all do.
    segment_ids: int32, the documents of packed rows as `nosa_jax.forward` takes them: each starts on a block boundary,
        -1 is padding. None where every row counts as one document.
    """

    tokens: Any
    targets: Any
    mask: Any = None
    segment_ids: Any = None


class Row(NamedTuple):
    """One row of a Batch: the same arrays, each [T]."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None = None
    segment_ids: np.ndarray | None = None

    def padding(self) -> Row:
        """A row like this one without any target."""
        zeros = np.zeros_like(self.tokens)
        segment_ids = None if self.segment_ids is None else zeros - 1
        return Row(zeros, zeros, zeros.astype(bool), segment_ids)

    def complete(self, *, mask: bool, segment_ids: bool) -> Row:
        """This row with the arrays that are asked for, which say what their absence said."""
        changed = self
        if mask and self.mask is None:
            changed = changed._replace(mask=np.ones(len(self.tokens), bool))
        if segment_ids and self.segment_ids is None:
            changed = changed._replace(segment_ids=np.zeros(len(self.tokens), np.int32))
        return changed


def stack(rows: Sequence[Row]) -> Batch:
    """Rows of one kind as a batch."""
    return Batch(*(None if column[0] is None else np.stack(column) for column in zip(*rows, strict=True)))


ORDER = 2
"""The version of the order that a seed stands for, which positions name. In the first one, which they did not name yet,
the order of a seed in one epoch was that of the next seed in the epoch before."""


class OtherOrderError(ValueError):
    """A position in an order of rows that this version does not make."""


class Batches(Iterator[Batch]):
    """An endless iterator of batches whose position is a small dict, made by `Source.batches`."""

    def __init__(self, dataset: Any) -> None:
        """dataset: a grain IterDataset of Batch, over a MapDataset."""
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """The position, JSON-able. It belongs to the source and arguments of this iterator, for any shard of as many
        rows over all processes."""
        return {**self._iterator.get_state(), "order": ORDER}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position of `get_state`: the next batch is exactly the one that would have come there.

        Raises OtherOrderError for a position in the order of another version, ValueError for anything else.
        """
        index = state.get("next_index") if isinstance(state, dict) else None
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise bad_value("state", "must be what get_state returned", f"{state!r:.60}", "Pass that dict unchanged.")
        if (order := state.get("order", 1)) != ORDER:
            rule = f"must be a position in the order of rows that this version makes, order {ORDER}"
            got = f"a position in order {order}"
            remedy = "Go on with the code that wrote it, or train on from its weights (model=) in another directory."
            raise OtherOrderError(str(bad_value("state", rule, got, remedy)))
        self._iterator.set_state({"next_index": index})


@runtime_checkable
class Source(Protocol):
    """What can be trained on. `train.text`, `jsonl`, `tokens`, `chat` and `mixture` make sources; so may you.

    length: T, the target tokens of a row.
    bytes_per_token: mean bytes of text behind a token, which turns a loss into bits per byte.
    vocab_size: all token ids are below it; see `check_vocabulary`.
    """

    @property
    def length(self) -> int: ...

    @property
    def bytes_per_token(self) -> float: ...

    @property
    def vocab_size(self) -> int: ...

    def fingerprint(self) -> str:
        """Short text that changes when what would be read changes; a checkpoint keeps it, so that resume can tell."""
        ...

    def batches(self, batch_size: int, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> Any:
        """An endless iterator of Batch with `get_state` and `set_state`, as `Batches` has them.

        shard: (index, count), this process among all that read: global batch i has `batch_size * count` rows, of which
            it gets those from `batch_size * index` on.
        """
        ...

    def heldout(
        self, batch_size: int, max_batches: int | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Batches of text that is never trained on, the same at every call; none where nothing is held out."""
        ...


def heldout_bytes_per_token(source: Source) -> float:
    """Mean bytes of text behind a token of what a source holds out: its `heldout_bytes_per_token` where it has one, as
    a mixture does, whose sources hold out other shares than they train on, else its `bytes_per_token`."""
    return float(getattr(source, "heldout_bytes_per_token", source.bytes_per_token))


def check_blocks(source: Source, block_size: int) -> None:
    """Raises ValueError unless packed documents begin on blocks of the model's attention."""
    packed = getattr(source, "block_size", None)
    if packed is not None and packed % block_size:
        rule = f"documents must start on blocks of the model, multiples of {block_size} tokens"
        raise bad_value("source", rule, f"block_size={packed}", f"Make it with block_size={block_size}.")


def check_vocabulary(source: Source, vocab_size: int) -> None:
    """Raises ValueError unless all token ids that `source` may give are below the model's `vocab_size`."""
    if source.vocab_size > vocab_size:
        raise bad_value(
            "source",
            f"must hold token ids below vocab_size = {vocab_size}",
            f"ids below {source.vocab_size}",
            "Use the tokenizer of the model, or give the model a larger vocabulary; bytes need 256.",
        )
