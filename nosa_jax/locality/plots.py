"""Figures of block selections. Works without a display and leaves pyplot and rcParams alone.

matplotlib is imported when something is drawn, not with this module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nosa_jax._drawing import COLOURS, MARKERS, finish, new_figure, tidy, whole_numbers
from nosa_jax._paths import user_path
from nosa_jax.locality.heatmaps import plot_difference, plot_heatmaps, require_index, steps_of
from nosa_jax.locality.measures import is_forced
from nosa_jax.locality.report import LocalityReport
from nosa_jax.locality.selections import Selections
from pallas_kernels.checks import bad_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Cells of the selection map, by value.
_CELLS = (
    ("not selected", "#F1F1EE"),
    ("sink and local", "#B9C4CE"),
    ("kept from the step before", "#0072B2"),
    ("new at this step", "#D55E00"),
    ("not yet written", "#FFFFFF"),
)


def draw(
    selections: Mapping[str, Selections],
    reports: Mapping[str, LocalityReport],
    folder: str | os.PathLike[str],
    *,
    heatmaps: bool = False,
) -> list[Path]:
    """Writes locality.png, which compares the methods, and selections-NAME.png, a map of the middle layer of each.

    selections, reports: by name of the method.   folder: where the files go; it must exist.
    heatmaps: also heatmap-NAME.png, all KV heads layer by layer, and difference-NAME.png, each later method less the
        first where both read the same positions.
    Returns the files. Raises ImportError without matplotlib.
    """
    folder = user_path("folder", folder)
    written = [folder / "locality.png"]
    plot_comparison(reports, written[0])
    for name, recorded in selections.items():
        written.append(folder / f"selections-{name}.png")
        plot_selection_map(recorded, layer=recorded.block_ids.shape[0] // 2, path=written[-1])
        if heatmaps:
            written.append(folder / f"heatmap-{name}.png")
            plot_heatmaps(recorded, path=written[-1])
    first = next(iter(selections.values()), None)
    for name, recorded in list(selections.items())[1:]:
        if heatmaps and first is not None and np.array_equal(first.positions, recorded.positions):
            written.append(folder / f"difference-{name}.png")
            plot_difference(first, recorded, path=written[-1])
    return written


def plot_comparison(reports: Mapping[str, LocalityReport], path: str | os.PathLike[str] | None = None) -> Any:
    """Methods compared: gamma by layer, misses by slots, gamma by position.

    Dashed lines: the gamma that a method guarantees. Dotted: the misses of the offline optimum. Shades: the range over
    KV heads.
    Returns a matplotlib Figure, written to `path` where given (the ending sets the format; without one it gets .png).
    Raises ValueError without reports, ImportError without matplotlib.
    """
    if not reports:
        raise bad_value("reports", "must hold at least one LocalityReport", "{}", "Pass {name: report}.")
    figure = new_figure(14.0, 4.4)
    by_layer, by_slots, by_position = figure.subplots(1, 3)
    for i, (name, report) in enumerate(reports.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8, "label": name}
        layers = np.arange(len(report.gamma))
        by_layer.plot(layers, report.gamma.mean(1), **style)
        by_layer.fill_between(layers, report.gamma.min(1), report.gamma.max(1), color=colour, alpha=0.15, linewidth=0)
        by_layer.axhline(report.guaranteed_gamma, color=colour, linestyle="--", linewidth=1)
        by_slots.plot(list(report.misses), [values.mean() for values in report.misses.values()], **style)
        optimum = [values.mean() for values in report.optimal_misses.values()]
        by_slots.plot(list(report.optimal_misses), optimum, color=colour, linestyle=":", linewidth=1.2)
        by_position.plot(report.positions, report.gamma_by_position, **style)
    tidy(by_layer, "Reuse by layer", "layer", r"$\gamma = |S_t \cap S_{t-1}|\,/\,|S_t|$")
    tidy(by_slots, "Transfers by size of the device pool", "slots (blocks)", "misses per step, layer and KV head")
    tidy(by_position, "Reuse along the text", "position of the query (tokens)", r"$\gamma$, mean of each block")
    whole_numbers(by_layer.xaxis)
    by_layer.set_ylim(top=1.005)
    by_position.set_ylim(top=1.005)
    by_slots.set_ylim(bottom=-0.03 * by_slots.get_ylim()[1])  # keeps the markers of a method without misses whole
    by_slots.set_xticks(sorted({slots for report in reports.values() for slots in report.misses}))
    _add_traffic_axis(by_slots, list(reports.values()))
    handles, names = by_layer.get_legend_handles_labels()
    handles += by_layer.plot([], [], color="#555555", linestyle="--", linewidth=1)
    names.append(r"guaranteed $\gamma$")
    if any(report.optimal_misses for report in reports.values()):
        handles += by_layer.plot([], [], color="#555555", linestyle=":", linewidth=1.2)
        names.append("offline optimum")
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return finish(figure, path)


def _add_traffic_axis(axes: Axes, reports: list[LocalityReport]) -> None:
    """A second scale in MiB per token, where one miss costs the same in all methods."""
    costs = {report.block_bytes * report.gamma.size / 2**20 for report in reports}
    if len(costs) != 1:
        return
    (cost,) = costs
    traffic = axes.secondary_yaxis(
        "right", functions=(lambda misses: np.asarray(misses) * cost, lambda mib: np.asarray(mib) / cost)
    )
    traffic.set_ylabel("host to device, MiB per token")


def plot_selection_map(
    selections: Selections,
    layer: int = 0,
    head: int = 0,
    row: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Which blocks one KV head selects at every step: query position against block id.

    Returns a matplotlib Figure, written to `path` where given. Raises ValueError when an index is out of range or the
    row has no step, ImportError without matplotlib.
    """
    layers, batch, heads = selections.block_ids.shape[:3]
    for name, index, size in (("layer", layer, layers), ("head", head, heads), ("row", row, batch)):
        require_index(name, index, size)
    steps = steps_of(selections, row)
    positions = selections.positions[row, :steps]
    cells = _map_cells(selections, layer, head, row, steps)

    from_position, to_position = int(positions[0]), int(positions[-1])
    figure = new_figure(10.0, 5.2)
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    axes = figure.subplots()
    axes.imshow(
        cells.T,
        cmap=ListedColormap([colour for _, colour in _CELLS]),
        norm=BoundaryNorm(np.arange(len(_CELLS) + 1) - 0.5, len(_CELLS)),
        interpolation="nearest",
        aspect="auto",
        origin="lower",
        extent=(from_position - 0.5, to_position + 0.5, -0.5, cells.shape[1] - 0.5),
    )
    title = f"{selections.label}: blocks selected in layer {layer}, KV head {head}"
    tidy(axes, title, "position of the query (tokens)", f"block ({selections.attention.block_size} tokens each)")
    axes.grid(False)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    shown = [i for i in range(len(_CELLS)) if (cells == i).any()]
    patches = [Patch(facecolor=_CELLS[i][1], edgecolor="#888888", linewidth=0.5, label=_CELLS[i][0]) for i in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return finish(figure, path)


def _map_cells(selections: Selections, layer: int, head: int, row: int, steps: int) -> np.ndarray:
    """int8 [T, M]: which of `_CELLS` each block is at each step. New blocks are marked also where they are forced."""
    ids, positions = selections.block_ids[layer, row, head, :steps], selections.positions[row, :steps]
    forced = np.asarray(is_forced(ids, positions, selections.attention))
    own = positions // selections.attention.block_size
    num_blocks = int(own[-1]) + 1
    held, fixed = np.zeros((2, steps, num_blocks + 1), bool)  # the last column takes the padding
    columns = np.where(ids < 0, num_blocks, ids)
    np.put_along_axis(held, columns, True, axis=1)
    np.put_along_axis(fixed, np.where(forced, columns, num_blocks), True, axis=1)
    held, fixed = held[:, :-1], fixed[:, :-1]
    new = held.copy()
    new[0] = False
    new[1:] &= ~held[:-1]
    unwritten = np.arange(num_blocks) > own[:, None]
    return np.select([unwritten, new, fixed, held], [4, 3, 1, 2], 0).astype(np.int8)
