"""What one method's selections amount to, layer by layer and KV head by KV head."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int, Int64

from nosa_jax._extras import import_extra
from nosa_jax.config import AttentionConfig
from nosa_jax.locality.history import reuse_time, working_set
from nosa_jax.locality.measures import (
    AnyArray,
    attended_distance,
    attended_tokens,
    checked_ids,
    checked_positions,
    counted_steps,
    gamma,
    gamma_unforced,
    guaranteed_overlap,
    is_forced,
    new_blocks,
)
from nosa_jax.locality.replay import belady_misses, replay_misses
from pallas_kernels.checks import bad_type, bad_value, require_bool, require_int, require_shape

WINDOWS = (16, 64)  # steps of the working sets that a report has unless told otherwise
_LEGEND = (
    "unforced: gamma without sink and local blocks; new: blocks per step; away: steps that a block was out before it\n"
    "came back; far: blocks from the query to unforced ones; share: of what dense attention reads; set@: blocks in\n"
    "use over so many steps",
    "miss, min, KiB: per step, with so many slots of the device pool; min: by the offline optimum (Belady)",
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LocalityReport:
    """Locality of one method, averaged over rows and counted steps. Arrays are float64 [L, K], NaN where undefined.

    steps: how many steps were counted, over all rows.   block_bytes: K and V of one block of one layer and KV head.
    gamma, gamma_unforced: see the functions of that name.   new_blocks: |S_t - S_(t-1)| per step.
    steps_away: how many steps a block was not selected before it came back; blocks that were kept do not count.
    distance_unforced: `attended_distance` of the blocks that were chosen, not forced, in blocks.
    dense_share: tokens of the selected blocks over those that dense attention reads (`attended_tokens`).
    working_set: by window, blocks in use over so many steps (`working_set`), of steps with a whole window behind them.
    misses: by number of slots, blocks fetched per step (`replay_misses`).
    optimal_misses: the same by the offline optimum (`belady_misses`); empty where it was not asked for.
    guaranteed_gamma: mean of `guaranteed_overlap` / |S_t|, what the method guarantees whatever the text.
    positions [n], gamma_by_position [n]: mean gamma of all queries in one block, and where that block begins.
    """

    label: str
    attention: AttentionConfig
    block_bytes: int
    steps: int
    gamma: Float64[np.ndarray, "L K"]
    gamma_unforced: Float64[np.ndarray, "L K"]
    new_blocks: Float64[np.ndarray, "L K"]
    steps_away: Float64[np.ndarray, "L K"]
    distance_unforced: Float64[np.ndarray, "L K"]
    dense_share: Float64[np.ndarray, "L K"]
    working_set: dict[int, Float64[np.ndarray, "L K"]]
    misses: dict[int, Float64[np.ndarray, "L K"]]
    optimal_misses: dict[int, Float64[np.ndarray, "L K"]]
    guaranteed_gamma: float
    positions: Int64[np.ndarray, " n"]
    gamma_by_position: Float64[np.ndarray, " n"]

    def bytes_per_token(self, slots: int) -> float:
        """Mean bytes from host to device per row and token, summed over layers and KV heads."""
        return float(self.misses[slots].sum() * self.block_bytes)

    def by_head(self) -> dict[str, Float64[np.ndarray, "L K"]]:
        """Every measure that has a value per layer and KV head, by name; dictionaries as misses@80."""
        found: dict[str, np.ndarray] = {}
        for name in (field.name for field in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, dict):
                found |= {f"{name}@{key}": values for key, values in value.items()}
            elif isinstance(value, np.ndarray) and value.ndim == 2:
                found[name] = value
        return found

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per layer and KV head: label, layer, head and `by_head`; `pandas.concat` puts
        methods and texts together. Raises ImportError without pandas."""
        pandas = import_extra("pandas")
        layers, heads = np.indices(self.gamma.shape).reshape(2, -1)
        measures = {name: values.reshape(-1) for name, values in self.by_head().items()}
        return pandas.DataFrame({"label": [self.label] * len(layers), "layer": layers, "head": heads, **measures})

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Reuse, then transfers: names of columns, and rows of text, layers and heads, then their mean and sum."""
        ratios = {"gamma": self.gamma, "unforced": self.gamma_unforced}
        sets = {f"set@{window}": values for window, values in self.working_set.items()}
        distances = {"away": self.steps_away, "far": self.distance_unforced, "share": self.dense_share}
        yield _text_table(ratios | {"new": self.new_blocks} | distances | sets, unsummed=(*ratios, *distances))
        transfers = {f"miss@{slots}": values for slots, values in self.misses.items()}
        transfers |= {f"min@{slots}": values for slots, values in self.optimal_misses.items()}
        transfers |= {f"KiB@{slots}": values * self.block_bytes / 1024 for slots, values in self.misses.items()}
        if transfers:
            yield _text_table(transfers)

    def _summary(self) -> str:
        return (
            f"{self.label}: {self.steps} steps; {self.attention.num_selected_blocks} blocks of "
            f"{self.attention.block_size} tokens selected; a block is {self.block_bytes / 1024:g} KiB; "
            f"guaranteed gamma {number(self.guaranteed_gamma, '.3f')}"
        )

    def table(self) -> str:
        """Reuse, then transfers: one line per layer and KV head, then their mean and sum; fixed width."""
        lines = [self._summary()]
        for (names, rows), legend in zip(self._tables(), _LEGEND, strict=False):  # no transfers without slots
            lines += [f"{layer:>5} {head:>5}" + "".join(f"{x:>10}" for x in xs) for layer, head, *xs in (names, *rows)]
            lines.append(legend)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"LocalityReport({self._summary()})"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the same tables."""
        row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        shown = [f"<p>{html.escape(self._summary())}</p>"]
        for (names, rows), legend in zip(self._tables(), _LEGEND, strict=False):
            body = "".join(row(cells, "td") for cells in rows)
            head = f"<caption>{legend}</caption><thead>{row(names, 'th')}</thead>"
            shown.append(f"<table>{head}<tbody>{body}</tbody></table>")
        return "".join(shown)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types for `json.dump`; NaN becomes None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["attention"] = dataclasses.asdict(self.attention)
        fields["bytes_per_token"] = {slots: self.bytes_per_token(slots) for slots in self.misses}
        return _plain(fields)


def _text_table(columns: dict[str, np.ndarray], unsummed: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Column names and cells, from arrays [L, K]. unsummed: columns that have no sum over layers and heads."""
    values = np.stack(list(columns.values()))  # [columns, L, K]
    sums = values.sum((1, 2))
    sums[[name in unsummed for name in columns]] = np.nan
    rows = [(str(layer), str(head), values[:, layer, head]) for layer, head in np.ndindex(values.shape[1:])]
    rows += [("", "mean", np.array([mean_over_heads(each) for each in values])), ("", "sum", sums)]
    specs = [".3f" if name in ("gamma", "unforced", "share") else ".2f" for name in columns]
    return ["layer", "head", *columns], [
        [layer, head, *(number(x, spec) for x, spec in zip(xs, specs, strict=True))] for layer, head, xs in rows
    ]


def mean_over_heads(values: np.ndarray) -> float:
    """Mean over layers and KV heads, of those where there is something to measure; NaN for none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def number(value: float, spec: str) -> str:
    """A number as tables show it, - for none."""
    return "-" if np.isnan(value) else format(value, spec)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _pool_sizes(slots: Any, width: int) -> list[int]:
    """`slots` as ints. Raises TypeError or ValueError unless it is a sequence of ints >= J, before anything runs."""
    if isinstance(slots, str) or not isinstance(slots, Iterable):
        raise bad_type("slots", "must be a sequence of pool sizes", repr(slots), f"Pass ({width},), for example.")
    rule = f"must be ints >= J = {width}, as a selection must fit"
    return [require_int("slots", size, width, rule) for size in slots]


def locality_report(
    block_ids: Int[AnyArray, "L B K T J"],
    positions: Int[AnyArray, "B T"],
    attention: AttentionConfig,
    *,
    bytes_per_block: int,
    slots: Sequence[int] | None = None,
    label: str | None = None,
    windows: Sequence[int] = WINDOWS,
    belady: bool = True,
) -> LocalityReport:
    """Measures selections.

    positions: int32 [B, T], the query's position at every step.   bytes_per_block: see `block_bytes`.
    slots: pool sizes to replay; None means J, 5/4 J, 3/2 J and 2 J.   label: None means the variant's name.
    windows: steps of the working sets.   belady: whether the offline optimum is replayed, too, which takes longest.
    Raises ValueError when no two steps follow each other, and for pools smaller than a selection.
    """
    require_shape("block_ids", block_ids, (None,) * 5, "[L, B, K, T, J]")
    require_shape("positions", positions, (block_ids.shape[1], block_ids.shape[3]), "[B, T]")
    ids, width = checked_ids(block_ids), block_ids.shape[-1]
    sizes = (width, width + width // 4, width + width // 2, 2 * width) if slots is None else _pool_sizes(slots, width)
    rows = checked_positions(positions[:, None], ids.shape[:-1])
    counted = np.asarray(counted_steps(ids))
    if not counted.any():
        raise bad_value("block_ids", "must hold two steps in a row", "none", "Record more than one step.")
    belady = require_bool("belady", belady)

    def mean(values: Any, where: np.ndarray = counted) -> np.ndarray:
        """Over rows, steps and what comes after them; NaN where nothing counts."""
        axes = (1, *range(3, where.ndim))
        total = np.where(where, np.asarray(values, np.float64), 0).sum(axes)
        return np.where(where.any(axes), total / np.maximum(where.sum(axes), 1), np.nan)

    steps_gamma, chosen = np.asarray(gamma(ids)), np.asarray(gamma_unforced(ids, rows, attention))
    bound = np.asarray(guaranteed_overlap(rows, attention) / jnp.maximum((ids >= 0).sum(-1), 1))
    own = np.asarray(rows)[counted] // attention.block_size
    per_block = np.bincount(own)
    seen = np.flatnonzero(per_block)
    since = reuse_time(ids)
    unforced = np.asarray((ids >= 0) & ~is_forced(ids, rows, attention)) & counted[..., None]
    # Steps with a whole window behind them: all of its steps have a selection.
    whole = np.cumsum(np.asarray((ids >= 0).any(-1)), axis=-1)
    sizes = sorted(set(sizes))
    return LocalityReport(
        label=attention.variant if label is None else label,
        attention=attention,
        block_bytes=bytes_per_block,
        steps=int(counted[0, :, 0].sum()),
        gamma=mean(steps_gamma),
        gamma_unforced=mean(chosen, ~np.isnan(chosen)),
        new_blocks=mean(new_blocks(ids)),
        steps_away=mean(since - 1, since > 1),
        distance_unforced=mean(attended_distance(ids, rows, attention), unforced),
        dense_share=mean(attended_tokens(ids, rows, attention)) / mean(rows + 1),
        working_set={size: mean(working_set(ids, size), counted & (whole >= size)) for size in sorted(set(windows))},
        misses={size: mean(replay_misses(ids, rows, attention, size)) for size in sizes},
        optimal_misses={size: mean(belady_misses(ids, rows, attention, size)) for size in sizes if belady},
        guaranteed_gamma=float(bound[counted].mean(dtype=np.float64)),
        positions=seen * attention.block_size,
        gamma_by_position=np.bincount(own, weights=steps_gamma[counted])[seen] / per_block[seen],
    )
