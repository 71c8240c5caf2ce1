"""Methods side by side, and one method over several texts or seeds, with spreads."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nosa_jax.locality.report import LocalityReport, mean_over_heads, number
from pallas_kernels.checks import bad_value, require_type


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PooledReports:
    """One method over several texts or seeds, each of which counts once, whatever its length.

    reports: that were pooled.
    mean, deviation: every number of a report, its mean and its sample standard deviation (over n - 1) over the reports;
        NaN where none, or only one, has it. `gamma_by_position` has the positions of all. `steps` are all steps.
    """

    reports: tuple[LocalityReport, ...]
    mean: LocalityReport
    deviation: LocalityReport

    def table(self) -> str:
        """One line per measure: its mean over layers and KV heads, ± its standard deviation over the reports."""
        return comparison_table({self.mean.label: self})

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"PooledReports({len(self.reports)} reports of {self.mean.label!r}, {self.mean.steps} steps)"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """In plain types for `json.dump`; NaN becomes None."""
        return {
            "reports": len(self.reports),
            "mean": self.mean.to_dict(),
            "deviation": self.deviation.to_dict(),
        }


def pool(reports: Sequence[LocalityReport]) -> PooledReports:
    """Pools the reports of one method over several texts or seeds.

    Raises ValueError for none, and where they differ in layers, KV heads, attention, block size in bytes, slots or
    windows.
    """
    reports = tuple(reports)
    if not reports:
        raise bad_value("reports", "must hold at least one LocalityReport", "none", "Pass those of several texts.")
    for report in reports:
        require_type("reports", report, LocalityReport, "Pass what Selections.report returns.")
    kinds = [(r.attention, r.block_bytes, {name: x.shape for name, x in r.by_head().items()}) for r in reports]
    for report, kind in zip(reports, kinds, strict=True):
        if kind != kinds[0]:
            rule = "must be of one attention and shape, with the same slots and windows"
            got = f"{reports[0]!r} and {report!r}"
            raise bad_value("reports", rule, got, "Pool methods and models one by one, each measured alike.")
    return PooledReports(reports, _combined(reports, _mean), _combined(reports, _deviation))


def _combined(reports: tuple[LocalityReport, ...], combine: Callable[[np.ndarray], np.ndarray]) -> LocalityReport:
    def of(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: of([value[key] for value in values]) for key in values[0]}
        return combine(np.stack(values).astype(np.float64))

    positions = np.unique(np.concatenate([report.positions for report in reports]))
    along = np.full((len(reports), len(positions)), np.nan)
    for row, report in zip(along, reports, strict=True):
        row[np.searchsorted(positions, report.positions)] = report.gamma_by_position
    averaged = {name: of([getattr(r, name) for r in reports]) for name in _averaged(reports[0])}
    return dataclasses.replace(
        reports[0],
        steps=sum(report.steps for report in reports),
        guaranteed_gamma=float(of([report.guaranteed_gamma for report in reports])),
        positions=positions,
        gamma_by_position=combine(along),
        **averaged,
    )


def _averaged(report: LocalityReport) -> list[str]:
    """Names of the fields with a value per layer and KV head."""
    return list(dict.fromkeys(name.partition("@")[0] for name in report.by_head()))


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of those that are not NaN."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the first axis, of those that are not NaN."""
    known = ~np.isnan(values)
    count = known.sum(0)
    squares = np.where(known, (values - _mean(values)) ** 2, 0).sum(0)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def comparison_table(reports: Mapping[str, LocalityReport | PooledReports]) -> str:
    """Methods side by side, one column each: means over layers and heads, bytes summed over them, gamma by layer.

    Of pooled reports the mean, ± the standard deviation over them.
    """
    methods = [entry.reports if isinstance(entry, PooledReports) else (entry,) for entry in reports.values()]
    everyone = [report for method in methods for report in method]
    windows, sizes, optima = (
        sorted({key for report in everyone for key in getattr(report, name)})
        for name in ("working_set", "misses", "optimal_misses")
    )
    absent = np.array([np.nan])
    rows: list[tuple[str, str, Callable[[LocalityReport], float]]] = [
        ("gamma", ".3f", lambda r: r.gamma.mean()),
        ("gamma, unforced blocks", ".3f", lambda r: mean_over_heads(r.gamma_unforced)),
        ("gamma, guaranteed", ".3f", lambda r: r.guaranteed_gamma),
        ("new blocks per step", ".2f", lambda r: r.new_blocks.mean()),
        ("steps away, blocks that come back", ".1f", lambda r: mean_over_heads(r.steps_away)),
        ("blocks back, unforced blocks", ".1f", lambda r: mean_over_heads(r.distance_unforced)),
        ("share of dense attention's tokens", ".3f", lambda r: r.dense_share.mean()),
    ]
    at = lambda name, key: lambda r: mean_over_heads(getattr(r, name).get(key, absent))
    rows += [(f"working set, {window} steps", ".1f", at("working_set", window)) for window in windows]
    for slots in sizes:
        rows.append((f"misses per step, {slots} slots", ".2f", at("misses", slots)))
        if slots in optima:
            rows.append((f"  of the offline optimum, {slots} slots", ".2f", at("optimal_misses", slots)))
    kib = lambda slots: lambda r: r.misses.get(slots, absent).sum() * r.block_bytes / 2**10
    rows += [(f"KiB per token, {slots} slots", ".1f", kib(slots)) for slots in sizes]
    of_layer = lambda layer: lambda r: r.gamma[layer].mean() if layer < len(r.gamma) else np.nan
    layers = range(max(len(report.gamma) for report in everyone))
    rows += [(f"gamma, layer {layer}", ".3f", of_layer(layer)) for layer in layers]

    cells = [[_cell(np.array([get(r) for r in method]), spec) for method in methods] for _, spec, get in rows]
    first = max(len(name) for name, _, _ in rows)
    width = max(8, *(len(name) for name in reports), *(len(cell) for line in cells for cell in line))
    lines = [" " * first + "".join(f"  {name:>{width}}" for name in reports)]
    for (name, _, _), line in zip(rows, cells, strict=True):
        lines.append(name.ljust(first) + "".join(f"  {cell:>{width}}" for cell in line))
    return "\n".join(lines)


def _cell(values: np.ndarray, spec: str) -> str:
    mean, deviation = float(_mean(values)), float(_deviation(values))
    return number(mean, spec) + ("" if len(values) == 1 or np.isnan(mean) else f" ±{number(deviation, spec)}")
