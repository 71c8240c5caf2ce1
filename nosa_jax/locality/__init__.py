"""How local block selections are: recording them, measuring reuse and transfers, comparing methods, drawing them.

    import nosa_jax
    from nosa_jax import locality

    methods = {"nosa": model, "infllmv2": nosa_jax.with_attention(model, variant="infllmv2")}
    prompt, text = tokens[0, :40], tokens[0, 40:]              # the same words for both
    selections = {name: locality.record(method, prompt, len(text), text) for name, method in methods.items()}
    reports = {name: recorded.report(slots=(8, 10)) for name, recorded in selections.items()}
    print(locality.comparison_table(reports))
    locality.draw(selections, reports, ".")                    # locality.png, selections-nosa.png, ...
    costs = {"nosa": locality.pool_costs(reports["nosa"], model.config, batch=16, max_length=8192)}
    print(locality.cost_table(costs))                          # bytes and time per token of each pool

`pool` puts the reports of several texts or seeds together, with spreads; `record(..., importance=True)` keeps what each
token weighs. Figures need the extra `plots`: pip install ".[plots]" in a checkout, and `report.to_dataframe()` pandas;
everything else needs the core alone. What the letters and shapes mean: `nosa_jax.locality.measures`.
"""

from nosa_jax.locality.comparison import PooledReports, comparison_table, pool
from nosa_jax.locality.costs import cost_table, pool_costs
from nosa_jax.locality.heatmaps import plot_difference, plot_heatmaps, selection_shares
from nosa_jax.locality.history import reuse_distance, reuse_time, working_set
from nosa_jax.locality.importance import TokenWeight, token_importance, top_tokens
from nosa_jax.locality.importance_plots import plot_importance, plot_top_tokens
from nosa_jax.locality.measures import (
    AnyArray,
    BlockIds,
    Positions,
    attended_distance,
    attended_tokens,
    counted_steps,
    gamma,
    gamma_unforced,
    guaranteed_overlap,
    holds_required_blocks,
    is_forced,
    mean_over_steps,
    meets_guaranteed_overlap,
    new_blocks,
    shared_blocks,
    unchanged_inside_block,
)
from nosa_jax.locality.plots import draw, plot_comparison, plot_selection_map
from nosa_jax.locality.replay import belady_misses, block_bytes, bytes_per_token, replay_misses
from nosa_jax.locality.report import LocalityReport, locality_report
from nosa_jax.locality.selections import Selections, record

__all__ = [
    "AnyArray",
    "BlockIds",
    "LocalityReport",
    "PooledReports",
    "Positions",
    "Selections",
    "TokenWeight",
    "attended_distance",
    "attended_tokens",
    "belady_misses",
    "block_bytes",
    "bytes_per_token",
    "comparison_table",
    "cost_table",
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
    "plot_difference",
    "plot_heatmaps",
    "plot_importance",
    "plot_selection_map",
    "plot_top_tokens",
    "pool",
    "pool_costs",
    "record",
    "replay_misses",
    "reuse_distance",
    "reuse_time",
    "selection_shares",
    "shared_blocks",
    "token_importance",
    "top_tokens",
    "unchanged_inside_block",
    "working_set",
]
