"""The figures of `nosa_jax.locality` under a short name."""

from nosa_jax.locality.heatmaps import plot_difference, plot_heatmaps
from nosa_jax.locality.importance_plots import plot_importance, plot_top_tokens
from nosa_jax.locality.plots import plot_comparison, plot_selection_map

__all__ = [
    "plot_comparison",
    "plot_difference",
    "plot_heatmaps",
    "plot_importance",
    "plot_selection_map",
    "plot_top_tokens",
]
