"""The figure that plots are drawn into. A module of its own, because it imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


class NotebookFigure(Figure):
    """A Figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = NotebookFigure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure
