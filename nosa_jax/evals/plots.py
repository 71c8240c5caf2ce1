"""A figure of scores. matplotlib is imported when something is drawn, not with this module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nosa_jax._drawing import COLOURS, MARKERS, finish, new_figure, tidy
from pallas_kernels.checks import bad_value

if TYPE_CHECKING:
    from nosa_jax.evals.table import Table

_STYLES = ("-", "--", ":", "-.")  # of the tables
_PER_TABLE = 4.2  # inches of the legend beside the axes and of these


def plot_scores(tables: Mapping[str, Table], path: str | os.PathLike[str] | None = None) -> Any:
    """Score by length: a line for each task, dashed otherwise for each table, with the standard error as a shade.

    tables: by the name of the model. Where no answers were generated the share of answers that greedy decoding would
        have given is drawn instead.
    path: where the figure is written; the ending sets the format, without one it gets .png. None writes nothing.

    Returns a matplotlib Figure. Raises ValueError without rows, ImportError without matplotlib.
    """
    rows = [row for table in tables.values() for row in table.rows]
    if not rows:
        raise bad_value("tables", "must hold at least one row", "none", "Evaluate something first.")
    generated = any(row["score"] is not None for row in rows)
    name = "score" if generated else "forced_exact"
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(_PER_TABLE + 4.6, 4.4)
    axes = figure.subplots()
    for number, (label, table) in enumerate(tables.items()):
        for task in tasks:
            found = sorted(
                (row for row in table.rows if row["task"] == task and row[name] is not None),
                key=lambda row: row["length"],
            )
            if not found:
                continue
            index = tasks.index(task)
            turn, colour = index // len(COLOURS), COLOURS[index % len(COLOURS)]
            lengths, scores = [row["length"] for row in found], [row[name] for row in found]
            errors = [(row["stderr"] or 0.0) if generated else 0.0 for row in found]
            axes.plot(
                lengths, scores, color=colour, marker=MARKERS[(index + turn) % len(MARKERS)], markersize=4.5,
                markerfacecolor="white" if turn % 2 else colour, linewidth=1.6,
                linestyle=_STYLES[number % len(_STYLES)], label=task if len(tables) == 1 else f"{label}: {task}",
            )  # fmt: skip
            low, high = ([s + sign * e for s, e in zip(scores, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(lengths, low, high, color=colour, alpha=0.12, linewidth=0)
    sizes = sorted({row["length"] for row in rows})
    title = "Scores by length" if len(tables) > 1 else f"{next(iter(tables))}: scores by length"
    tidy(axes, title, "length (tokens)", "score" if generated else "answers that greedy decoding would give")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right center", frameon=False)
    return finish(figure, path)
