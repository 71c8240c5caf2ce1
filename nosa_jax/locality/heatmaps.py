"""Heat maps: how many KV heads select each block at each step, layer beside layer, and one method less another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from nosa_jax._drawing import finish, new_figure, tidy, whole_numbers
from nosa_jax.locality.selections import Selections
from pallas_kernels.checks import bad_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LAYERS = 8  # small multiples unless layers are named


def selection_shares(
    selections: Selections, row: int = 0, *, layer: int | None = None, head: int | None = None
) -> Float32[np.ndarray, "T M"]:
    """The share of layers and KV heads that select each block at each step of a row: T steps, M blocks.

    layer, head: of one of them only; None takes all.   NaN where a block is not yet written.
    Raises ValueError when an index is out of range or the row has no step.
    """
    chosen, steps = _ids(selections, row, layer, head)
    own = selections.positions[row, :steps] // selections.attention.block_size
    num_blocks = int(own[-1]) + 1
    counts = np.zeros((steps, num_blocks + 1), np.float32)  # the last column takes the padding
    columns = np.where(chosen < 0, num_blocks, chosen)
    for lane in columns:
        counts[np.arange(steps)[:, None], lane] += 1  # no block twice in a selection
    shares = counts[:, :-1] / len(columns)
    return np.where(np.arange(num_blocks) > own[:, None], np.float32(np.nan), shares)


def _ids(selections: Selections, row: int, layer: int | None, head: int | None) -> tuple[np.ndarray, int]:
    """Ids [lanes, steps, J] of a row, of its steps without padding."""
    layers, batch, heads = selections.block_ids.shape[:3]
    for name, index, size in (("layer", layer, layers), ("head", head, heads), ("row", row, batch)):
        if index is not None:
            require_index(name, index, size)
    steps = steps_of(selections, row)
    pick = lambda index: slice(None) if index is None else slice(index, index + 1)
    ids = selections.block_ids[pick(layer), row, pick(head), :steps]
    return ids.reshape(-1, *ids.shape[-2:]), steps


def require_index(name: str, index: int, size: int) -> None:
    """Raises ValueError unless `index` is one of `size`."""
    if not 0 <= index < size:
        raise bad_value(name, f"must be in 0 .. {size - 1}", index, "Pick one that was recorded.")


def steps_of(selections: Selections, row: int) -> int:
    """Steps of a row; raises ValueError for none."""
    steps = int((selections.positions[row] >= 0).sum())
    if steps == 0:
        raise bad_value("row", "must have at least one step", row, "Pick another row.")
    return steps


def spread_layers(layers: Sequence[int] | None, count: int, most: int) -> list[int]:
    """The layers to draw: those named, else all, or `most` of them from the first to the last."""
    if layers is None:
        return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})
    for layer in layers:
        require_index("layers", layer, count)
    if not layers:
        raise bad_value("layers", "must name at least one", "none", "Pass None for a choice of them.")
    return list(layers)


def plot_heatmaps(
    selections: Selections,
    layers: Sequence[int] | None = None,
    head: int | None = None,
    row: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Small multiples over layers: the share of KV heads that select each block, by position of the query.

    layers: None draws up to eight, from the first to the last.   head: one KV head only; None takes all.
    Returns a matplotlib Figure, written to `path` where given. Raises ValueError when an index is out of range or the
    row has no step, ImportError without matplotlib.
    """
    drawn = spread_layers(layers, selections.block_ids.shape[0], _MOST_LAYERS)
    shares = [selection_shares(selections, row, layer=layer, head=head) for layer in drawn]
    columns = min(len(drawn), 4)
    lines = -(-len(drawn) // columns)
    figure = new_figure(3.4 * columns + 1.0, 2.6 * lines + 0.6)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, layer, values in zip(grid.flat, drawn, shares, strict=False):
        image = _draw(axes, values, selections, row, f"layer {layer}", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=grid, label="share of KV heads" if head is None else f"selected by KV head {head}")
    figure.suptitle(f"{selections.label}: blocks selected", x=0.01, ha="left", fontweight="bold")
    return finish(figure, path)


def plot_difference(
    selections: Selections,
    other: Selections,
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Where two methods select other blocks over the same text: the share of layers and KV heads of `other` that select
    a block, less that of `selections`.

    layer, head: of one of them only; None takes all.
    Returns a matplotlib Figure, written to `path` where given. Raises ValueError when the two have other positions or
    blocks, an index is out of range or the row has no step, ImportError without matplotlib.
    """
    for name, one, two in (
        ("positions", selections.positions, other.positions),
        ("attention.block_size", selections.attention.block_size, other.attention.block_size),
    ):
        if not np.array_equal(one, two):
            raise bad_value("other", f"must have the {name} of the first", "others", "Record both over the same text.")
    shares = [selection_shares(each, row, layer=layer, head=head) for each in (selections, other)]
    figure = new_figure(10.0, 5.0)
    axes = figure.subplots()
    where = ", ".join(
        f"{what} {index}" if index is not None else f"all {what}s" for what, index in (("layer", layer), ("head", head))
    )
    title = f"{other.label} less {selections.label}: {where}"
    image = _draw(axes, shares[1] - shares[0], selections, row, title, cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=axes, label=f"red: {other.label} selects it more; blue: {selections.label}")
    return finish(figure, path)


def _draw(axes: Axes, values: np.ndarray, selections: Selections, row: int, title: str, **style: Any) -> Any:
    """An image of [T, M]: positions to the right, blocks upward; what is not yet written stays white."""
    first = int(selections.positions[row, 0])
    extent = (first - 0.5, first + len(values) - 0.5, -0.5, values.shape[1] - 0.5)
    image = axes.imshow(values.T, origin="lower", aspect="auto", interpolation="nearest", extent=extent, **style)
    tidy(axes, title, "position of the query", f"block ({selections.attention.block_size} tokens)")
    axes.grid(False)
    axes.label_outer()
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    return image
