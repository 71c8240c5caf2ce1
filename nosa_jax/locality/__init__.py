"""How local block selections are: recording them, measuring reuse and transfers, comparing methods, drawing them.

    from nosa_jax import locality

    selections = {"nosa": locality.record(model, prompt, 512), "infllmv2": locality.record(rival, prompt, 512)}
    reports = {name: recorded.report(slots=(64, 80, 96)) for name, recorded in selections.items()}
    print(locality.comparison_table(reports))
    locality.draw(selections, reports, "figures")

Figures need the extra `plots`: pip install "nosa-jax[plots]"; everything else needs the core alone. What the letters
and shapes mean: `nosa_jax.locality.measures`.
"""

from nosa_jax.locality.measures import (
    AnyArray,
    BlockIds,
    Positions,
    block_bytes,
    bytes_per_token,
    counted_steps,
    gamma,
    gamma_unforced,
    guaranteed_overlap,
    holds_required_blocks,
    is_forced,
    mean_over_steps,
    meets_guaranteed_overlap,
    new_blocks,
    replay_misses,
    shared_blocks,
    unchanged_inside_block,
)
from nosa_jax.locality.plots import draw, plot_comparison, plot_selection_map
from nosa_jax.locality.report import LocalityReport, comparison_table, locality_report
from nosa_jax.locality.selections import Selections, record

__all__ = [
    "AnyArray",
    "BlockIds",
    "LocalityReport",
    "Positions",
    "Selections",
    "block_bytes",
    "bytes_per_token",
    "comparison_table",
    "counted_steps",
    "draw",
    "gamma",
    "gamma_unforced",
    "guaranteed_overlap",
    "holds_required_blocks",
    "is_forced",
    "locality_report",
    "mean_over_steps",
    "meets_guaranteed_overlap",
    "new_blocks",
    "plot_comparison",
    "plot_selection_map",
    "record",
    "replay_misses",
    "shared_blocks",
    "unchanged_inside_block",
]
