"""A figure of a run, drawn from its log. Works without a display and leaves pyplot and rcParams alone.

matplotlib is imported when something is drawn, not with this module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nosa_jax._drawing import COLOURS, MARKERS, finish, new_figure, tidy, whole_numbers
from nosa_jax.train.log import Record, as_records
from pallas_kernels.checks import bad_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_BLUE, _RED = COLOURS[:2]  # of training and of held-out text; of the first and of the last evaluation


def plot_run(log: str | os.PathLike[str] | Sequence[Record], path: str | os.PathLike[str] | None = None) -> Any:
    """How a run went: loss of training and held-out text, loss along the rows, gradient norm and learning rate, and for
    sparse models reuse, transfers and the size of the bias by layer. What the log does not hold is left out.

    log: a log, the folder of a run, or records as `read_log` returns them.
    path: where the figure is written; the ending sets the format, without one it gets .png. None writes nothing.

    Returns a matplotlib Figure. Raises ValueError where there is nothing to draw, ImportError without matplotlib.
    """
    records = as_records(log)
    steps, evaluations = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    panels = [
        *([_loss] if _with("loss", steps + evaluations) else []),
        *([_by_position] if _with("loss_by_position", evaluations) else []),
        *([_gradients] if _with("grad_norm", steps) else []),
        *([_reuse] if _with("gamma", evaluations) else []),
        *([_transfers] if _with("misses", evaluations) else []),
        *([_bias] if _with("bias_by_layer", evaluations) else []),
    ]
    if not panels:
        raise bad_value("log", "must hold records of steps or evaluations", "none", "Train first.")
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = new_figure(4.7 * columns, 3.7 * rows)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, place in zip(panels, places, strict=False):
        panel(place, steps, evaluations)
    for place in places[len(panels) :]:
        place.remove()
    return finish(figure, path)


def _with(name: str, records: Sequence[Record]) -> list[Record]:
    """The records in which a field holds something."""
    return [record for record in records if record.get(name) not in (None, [], {})]


def _numbers(values: Iterable[Any]) -> list[float]:
    """`values` as a curve takes them, which has a gap where a number was not finite: None in a log."""
    return [math.nan if value is None else value for value in values]


def _curve(axes: Axes, records: Sequence[Record], name: str, **style: Any) -> None:
    """A field over the steps."""
    axes.plot([record["step"] for record in records], [record[name] for record in records], **style)


def _style(index: int, label: str) -> dict[str, Any]:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6, "label": label}


def _loss(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    for records, style in (
        (_with("loss", steps), {"color": _BLUE, "linewidth": 1.0, "label": "training, before each step"}),
        (_with("loss", evaluations), {**_style(1, "held out"), "marker": MARKERS[0]}),
    ):
        if records:
            _curve(axes, records, "loss", **style)
    tidy(axes, "Loss", "step", "nats per token")
    axes.legend(frameon=False)


def _first_and_last(evaluations: list[Record], name: str) -> list[tuple[Record, dict[str, Any]]]:
    """The first and the last evaluation that hold a field, with how they are drawn; one where there is one only."""
    found = _with(name, evaluations)
    ends = [found[0]] if len(found) == 1 else [found[0], found[-1]]
    return [(record, _style(i, f"after step {record['step']}")) for i, record in enumerate(ends)]


def _by_position(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    for record, style in _first_and_last(evaluations, "loss_by_position"):
        parts = {int(start): loss for start, loss in record["loss_by_position"].items()}
        axes.plot(list(parts), _numbers(parts.values()), **style)
    tidy(
        axes, "Held-out loss along the row", "position where each part begins (tokens)", "nats per token, mean of part"
    )
    axes.legend(frameon=False)


def _gradients(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    norms = _with("grad_norm", steps)
    _curve(axes, norms, "grad_norm", color=_BLUE, linewidth=1.0)
    tidy(axes, "Gradient norm and learning rate", "step", "gradient norm before clipping")
    if all(record["grad_norm"] > 0 for record in norms):
        axes.set_yscale("log")
    rates = _with("learning_rate", steps)
    if not rates:
        axes.set_title("Gradient norm", loc="left", fontsize=11, fontweight="bold")
        return
    axes.yaxis.label.set_color(_BLUE)
    other = axes.twinx()
    _curve(other, rates, "learning_rate", color=_RED, linewidth=1.6)
    other.set_ylabel("learning rate", color=_RED)
    other.set_ylim(bottom=0)
    other.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    other.spines["top"].set_visible(False)


def _reuse(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    _curve(axes, _with("gamma", evaluations), "gamma", **_style(0, "gamma"))
    tidy(axes, "Reuse of blocks", "step", r"$\gamma = |S_t \cap S_{t-1}|\,/\,|S_t|$")


def _transfers(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    found = _with("misses", evaluations)
    sizes = sorted({int(slots) for record in found for slots in record["misses"]})
    for i, slots in enumerate(sizes):
        points = [(record["step"], record["misses"][str(slots)]) for record in found if str(slots) in record["misses"]]
        axes.plot(*zip(*points, strict=True), **_style(i, f"{slots} slots"))
    tidy(axes, "Transfers by size of the device pool", "step", "misses per token, layer and KV head")
    axes.legend(frameon=False)


def _bias(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    for record, style in _first_and_last(evaluations, "bias_by_layer"):
        axes.plot(range(len(record["bias_by_layer"])), _numbers(record["bias_by_layer"]), **style)
    tidy(axes, "Size of the bias by layer", "layer", "root mean square of the importance b")
    whole_numbers(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
