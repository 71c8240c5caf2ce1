"""Figures of importance: along the tokens of a text, and the tokens that have most of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nosa_jax._drawing import COLOURS, finish, new_figure, tidy, whole_numbers
from nosa_jax.locality.heatmaps import spread_layers
from nosa_jax.locality.importance import top_tokens
from pallas_kernels.checks import require_shape

_MOST_LAYERS = 4


def plot_importance(
    importance: Float[np.ndarray, "L K T"],
    layers: Sequence[int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The importance of each token of one row, a panel per layer and a line per KV head.

    importance: e.g. `selections.importance[:, row]`.   layers: None draws up to four, from the first to the last.
    Returns a matplotlib Figure, written to `path` where given. Raises ValueError for a wrong shape or layer,
    ImportError without matplotlib.
    """
    require_shape("importance", importance, (None,) * 3, "[L, K, T]")
    drawn = spread_layers(layers, len(importance), _MOST_LAYERS)
    figure = new_figure(11.0, 1.9 * len(drawn) + 0.6)
    grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, layer in zip(grid, drawn, strict=True):
        for head, values in enumerate(importance[layer]):
            axes.plot(values, color=COLOURS[head % len(COLOURS)], linewidth=0.8, label=f"KV head {head}")
        tidy(axes, f"layer {layer}", "token", "importance")
        axes.label_outer()
        whole_numbers(axes.xaxis)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 8), frameon=False)
    return finish(figure, path)


def plot_top_tokens(
    importance: Float[np.ndarray, "*heads T"],
    tokens: Int[np.ndarray, " T"],
    tokenizer: Any = None,
    *,
    count: int = 20,
    least: int = 1,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Bars of the tokens that matter most in a text, with their texts and how often they came; see `top_tokens`.

    Returns a matplotlib Figure, written to `path` where given. Raises ImportError without matplotlib.
    """
    found = top_tokens(importance, tokens, tokenizer, count=count, least=least)
    figure = new_figure(7.0, 0.28 * max(len(found), 3) + 1.2)
    axes = figure.subplots()
    places = np.arange(len(found))
    axes.barh(places, [one.importance for one in found], color=COLOURS[0])
    # A dollar sign in a text is no formula.
    axes.set_yticks(places, [f"{one.text}  ×{one.occurrences}" for one in found], parse_math=False, family="monospace")
    axes.invert_yaxis()
    tidy(axes, "Tokens that matter most", "mean importance, standard deviations of each head", "")
    return finish(figure, path)
