"""Query-aware block scores.

Contract: softmax over the visible pooled keys per head, summed over the G heads of a KV head, then the maximum over the
windows that touch a block. Invisible windows count as 0; a query that sees no window scores 0 everywhere.
"""

from pallas_kernels.block_scores.api import block_scores

__all__ = ["block_scores"]
