"""What one method's selections amount to, layer by layer, and methods side by side."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int, Int64

from nosa_jax.config import AttentionConfig
from nosa_jax.locality.measures import (
    AnyArray,
    checked_ids,
    checked_positions,
    counted_steps,
    gamma,
    gamma_unforced,
    guaranteed_overlap,
    new_blocks,
    replay_misses,
)
from pallas_kernels.checks import bad_value, require_shape

_LEGEND = "unforced: gamma without sink and local blocks; new, miss, KiB: per step; @: slots of the device pool"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LocalityReport:
    """Locality of one method, averaged over rows and counted steps. Arrays are float64 [L, K], NaN where undefined.

    steps: how many steps were counted, over all rows.   block_bytes: K and V of one block of one layer and KV head.
    gamma, gamma_unforced: see the functions of that name.   new_blocks: |S_t - S_(t-1)| per step.
    misses: by number of slots, blocks fetched per step (`replay_misses`).
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
    misses: dict[int, Float64[np.ndarray, "L K"]]
    guaranteed_gamma: float
    positions: Int64[np.ndarray, " n"]
    gamma_by_position: Float64[np.ndarray, " n"]

    def bytes_per_token(self, slots: int) -> float:
        """Mean bytes from host to device per row and token, summed over layers and KV heads."""
        return float(self.misses[slots].sum() * self.block_bytes)

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        """Names of columns, and rows of text: layers and heads, then their mean and sum."""
        kib = self.block_bytes / 1024
        columns = {"gamma": self.gamma, "unforced": self.gamma_unforced, "new": self.new_blocks}
        columns |= {f"miss@{slots}": values for slots, values in self.misses.items()}
        columns |= {f"KiB@{slots}": values * kib for slots, values in self.misses.items()}
        values = np.stack(list(columns.values()))  # [columns, L, K]
        sums = values.sum((1, 2))
        sums[:2] = np.nan  # a ratio has no sum
        rows = [(str(layer), str(head), values[:, layer, head]) for layer, head in np.ndindex(self.gamma.shape)]
        rows += [("", "mean", values.mean((1, 2))), ("", "sum", sums)]
        specs = [".3f" if i < 2 else ".2f" for i in range(len(columns))]
        return ["layer", "head", *columns], [
            [layer, head, *(_number(x, spec) for x, spec in zip(xs, specs, strict=True))] for layer, head, xs in rows
        ]

    def _summary(self) -> str:
        return (
            f"{self.label}: {self.steps} steps; {self.attention.num_selected_blocks} blocks of "
            f"{self.attention.block_size} tokens selected; a block is {self.block_bytes / 1024:g} KiB; "
            f"guaranteed gamma {_number(self.guaranteed_gamma, '.3f')}"
        )

    def table(self) -> str:
        """One line per layer and KV head, then their mean and sum; fixed width."""
        names, rows = self._columns()
        lines = [f"{layer:>5} {head:>5}" + "".join(f"{x:>10}" for x in xs) for layer, head, *xs in (names, *rows)]
        return "\n".join([self._summary(), *lines, _LEGEND])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"LocalityReport({self._summary()})"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the same table."""
        names, rows = self._columns()
        row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        body = "".join(row(cells, "td") for cells in rows)
        return (
            f"<table><caption>{html.escape(self._summary())}<br>{_LEGEND}</caption>"
            f"<thead>{row(names, 'th')}</thead><tbody>{body}</tbody></table>"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types for `json.dump`; NaN becomes None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["attention"] = dataclasses.asdict(self.attention)
        fields["bytes_per_token"] = {slots: self.bytes_per_token(slots) for slots in self.misses}
        return _plain(fields)


def _number(value: float, spec: str) -> str:
    return "-" if np.isnan(value) else format(value, spec)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def locality_report(
    block_ids: Int[AnyArray, "L B K T J"],
    positions: Int[AnyArray, "B T"],
    attention: AttentionConfig,
    *,
    bytes_per_block: int,
    slots: Sequence[int] | None = None,
    label: str | None = None,
) -> LocalityReport:
    """Measures selections.

    positions: int32 [B, T], the query's position at every step.   bytes_per_block: see `block_bytes`.
    slots: pool sizes to replay; None means J, 5/4 J, 3/2 J and 2 J.   label: None means the variant's name.
    Raises ValueError when no two steps follow each other.
    """
    require_shape("block_ids", block_ids, (None,) * 5, "[L, B, K, T, J]")
    require_shape("positions", positions, (block_ids.shape[1], block_ids.shape[3]), "[B, T]")
    ids, width = checked_ids(block_ids), block_ids.shape[-1]
    rows = checked_positions(positions[:, None], ids.shape[:-1])
    counted = np.asarray(counted_steps(ids))
    if not counted.any():
        raise bad_value("block_ids", "must hold two steps in a row", "none", "Record more than one step.")

    def mean(values: Any, where: np.ndarray = counted) -> np.ndarray:
        total = np.where(where, np.asarray(values, np.float64), 0).sum((1, 3))
        return np.where(where.any((1, 3)), total / np.maximum(where.sum((1, 3)), 1), np.nan)

    steps_gamma, chosen = np.asarray(gamma(ids)), np.asarray(gamma_unforced(ids, rows, attention))
    bound = np.asarray(guaranteed_overlap(rows, attention) / jnp.maximum((ids >= 0).sum(-1), 1))
    own = np.asarray(rows)[counted] // attention.block_size
    per_block = np.bincount(own)
    seen = np.flatnonzero(per_block)
    sizes = (width, width + width // 4, width + width // 2, 2 * width) if slots is None else slots
    return LocalityReport(
        label=attention.variant if label is None else label,
        attention=attention,
        block_bytes=bytes_per_block,
        steps=int(counted[0, :, 0].sum()),
        gamma=mean(steps_gamma),
        gamma_unforced=mean(chosen, ~np.isnan(chosen)),
        new_blocks=mean(new_blocks(ids)),
        misses={size: mean(replay_misses(ids, rows, attention, size)) for size in sorted(set(sizes))},
        guaranteed_gamma=float(bound[counted].mean(dtype=np.float64)),
        positions=seen * attention.block_size,
        gamma_by_position=np.bincount(own, weights=steps_gamma[counted])[seen] / per_block[seen],
    )


def comparison_table(reports: Mapping[str, LocalityReport]) -> str:
    """Methods side by side, one column each: means over layers and heads, bytes summed over them, gamma by layer."""
    methods, absent = list(reports.values()), np.array([np.nan])
    rows: list[tuple[str, str, list[float]]] = [
        ("gamma", ".3f", [r.gamma.mean() for r in methods]),
        ("gamma, unforced blocks", ".3f", [r.gamma_unforced.mean() for r in methods]),
        ("gamma, guaranteed", ".3f", [r.guaranteed_gamma for r in methods]),
        ("new blocks per step", ".2f", [r.new_blocks.mean() for r in methods]),
    ]
    sizes = sorted({slots for report in methods for slots in report.misses})
    misses = {slots: [r.misses.get(slots, absent) for r in methods] for slots in sizes}
    for slots in sizes:
        rows.append((f"misses per step, {slots} slots", ".2f", [values.mean() for values in misses[slots]]))
    for slots in sizes:
        kib = [values.sum() * r.block_bytes / 2**10 for values, r in zip(misses[slots], methods, strict=True)]
        rows.append((f"KiB per token, {slots} slots", ".1f", kib))
    for layer in range(max(len(r.gamma) for r in methods)):
        by_layer = [r.gamma[layer].mean() if layer < len(r.gamma) else np.nan for r in methods]
        rows.append((f"gamma, layer {layer}", ".3f", by_layer))
    first, width = max(len(name) for name, _, _ in rows), max(8, *(len(name) for name in reports))
    header = " " * first + "".join(f"  {name:>{width}}" for name in reports)
    lines = [name.ljust(first) + "".join(f"  {_number(x, spec):>{width}}" for x in xs) for name, spec, xs in rows]
    return "\n".join([header, *lines])
