"""How local block selections are: recording them, measuring reuse and transfers, comparing methods, drawing them.

    import nosa_jax
    from nosa_jax import locality

    methods = {"nosa": model, "infllmv2": nosa_jax.with_attention(model, variant="infllmv2")}
    prompt, text = tokens[0, :40], tokens[0, 40:]              # the same words for both
    selections = {name: locality.record(method, prompt, len(text), text) for name, method in methods.items()}
    reports = {name: recorded.report(slots=(8, 10)) for name, recorded in selections.items()}
    print(locality.comparison_table(reports))
    locality.draw(selections, reports, ".")                    # locality.png, selections-nosa.png, ...

Figures need the extra `plots`: pip install ".[plots]" in a checkout; everything else needs the core alone. What the
letters and shapes mean: `nosa_jax.locality.measures`.
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
