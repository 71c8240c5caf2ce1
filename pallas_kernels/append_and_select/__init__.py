"""One new token per row, up to what its attention needs: rotation, summaries, selection, slots.

Contract: what `append_token`, `block_scores` and `select_blocks` of the one query, and `resolve_slots` give one after
the other, for sparse variants. A missing block that starts with this very token takes a slot, but is not to be loaded.
"""

from pallas_kernels.append_and_select.api import append_and_select
from pallas_kernels.append_and_select.arguments import Projected, Selectable, Sizes

__all__ = ["Projected", "Selectable", "Sizes", "append_and_select"]
