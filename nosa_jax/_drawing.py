"""What all figures share: how they look, and how they are written. matplotlib is imported when something is drawn."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nosa_jax._extras import import_extra
from nosa_jax._paths import replacing, user_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct also to colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, without pyplot. Raises ImportError without matplotlib."""
    import_extra("matplotlib")
    from nosa_jax._figure import empty_figure  # imports matplotlib

    return empty_figure(width, height)


def finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, written to `path` where given: the ending sets the format, and without one it gets .png."""
    if path is not None:
        file = user_path("path", path)
        if not file.suffix:
            file = file.with_name(f"{file.name.rstrip('.')}.png")  # as matplotlib would name it
        # An open file, whose name matplotlib cannot change.
        with replacing(file) as new, new.open("wb") as stream:
            figure.savefig(stream, format=file.suffix[1:], dpi=150)
    return figure


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, a pale grid, and no frame."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#E3E3E0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
