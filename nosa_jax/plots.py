"""The figures of `nosa_jax.locality` under a short name."""

from nosa_jax.locality.plots import plot_comparison, plot_selection_map

__all__ = ["plot_comparison", "plot_selection_map"]
